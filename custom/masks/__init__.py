"""The mask generation module (MGM): new label maps that keep the topology of a reference."""

from custom.masks.cases import UnfinishedCases, generation_cases, is_made
from custom.masks.run import generate_masks
from custom.masks.transforms import GenerateMaskd, PrepareMaskd, SaveMaskd

__all__ = [
    "GenerateMaskd",
    "PrepareMaskd",
    "SaveMaskd",
    "UnfinishedCases",
    "generate_masks",
    "generation_cases",
    "is_made",
]
