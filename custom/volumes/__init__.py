"""One case: lists, reading and checks, writing, grids, intensities, pictures."""

from custom.volumes.cases import check_files, load_cases, pending, rendering_cases
from custom.volumes.grids import InvertImaged
from custom.volumes.reading import CheckVolumesd, LoadVolumesd
from custom.volumes.writing import SaveVolumed

__all__ = [
    "CheckVolumesd",
    "InvertImaged",
    "LoadVolumesd",
    "SaveVolumed",
    "check_files",
    "load_cases",
    "pending",
    "rendering_cases",
]
