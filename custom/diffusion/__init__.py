"""StructDiff: template-guided diffusion of CT volumes."""

from custom.diffusion.loss import StructDiffLoss
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.pairs import RandTemplatePaird
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.schedule import ListedDDIMScheduler
from custom.diffusion.training import MeasureResidual, PrepareRendering, PrepareResidualDiffusion
from custom.diffusion.transforms import (
    AlignTemplated,
    LabelStatisticsd,
    PaintPriord,
    RandPaintPriord,
    SplitNoised,
    VaryContrastd,
)

__all__ = [
    "AlignTemplated",
    "LabelStatisticsd",
    "ListedDDIMScheduler",
    "MeasureResidual",
    "PaintPriord",
    "PrepareRendering",
    "PrepareResidualDiffusion",
    "RandPaintPriord",
    "RandTemplatePaird",
    "SplitNoised",
    "StructDiffInferer",
    "StructDiffLoss",
    "StructDiffUNet",
    "VaryContrastd",
]
