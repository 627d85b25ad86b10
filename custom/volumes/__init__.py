"""One case: lists, reading and checks, writing, grids, intensities, pictures."""

from custom.volumes.anatomy import Anatomy
from custom.volumes.cases import check_files, load_cases, rendering_cases, unfinished
from custom.volumes.grids import InvertImaged
from custom.volumes.reading import LoadVolumesd, reading
from custom.volumes.writing import SaveVolumed

__all__ = [
    "Anatomy",
    "InvertImaged",
    "LoadVolumesd",
    "SaveVolumed",
    "check_files",
    "load_cases",
    "reading",
    "rendering_cases",
    "unfinished",
]
