"""One case: lists, reading and checks, writing, grids, intensities, pictures."""

from custom.volumes.anatomy import Anatomy
from custom.volumes.cases import check_files, load_cases, rendering_cases, segmentation_cases, validation_cases
from custom.volumes.finished import unfinished
from custom.volumes.grids import InvertImaged
from custom.volumes.origins import SaveOrigind, is_rendered
from custom.volumes.reading import LoadVolumesd, reading_chain
from custom.volumes.segmentations import KeepPiecesd, LabelsOnFileGridd
from custom.volumes.writing import CheckFinited, SaveVolumed

__all__ = [
    "Anatomy",
    "CheckFinited",
    "InvertImaged",
    "KeepPiecesd",
    "LabelsOnFileGridd",
    "LoadVolumesd",
    "SaveOrigind",
    "SaveVolumed",
    "check_files",
    "is_rendered",
    "load_cases",
    "reading_chain",
    "rendering_cases",
    "segmentation_cases",
    "unfinished",
    "validation_cases",
]
