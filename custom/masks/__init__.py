"""The mask generation module (MGM): new label maps that keep the topology of a reference."""

from custom.masks.cases import generation_cases, unfinished
from custom.masks.generator import Edits, Motion
from custom.masks.summary import summarise_masks
from custom.masks.transforms import GenerateMaskd, PrepareMaskd, SaveMaskd
from custom.volumes.anatomy import Label

__all__ = [
    "Edits",
    "GenerateMaskd",
    "Motion",
    "PrepareMaskd",
    "SaveMaskd",
    "Label",
    "generation_cases",
    "summarise_masks",
    "unfinished",
]
