"""StructDiff: template-guided diffusion of CT volumes."""

from custom.diffusion.loss import StructDiffLoss
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.pairs import RandTemplatePaird
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.training import MeasureResidual, PrepareRendering, PrepareResidualDiffusion, TrackResidual
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
    "TrackResidual",
    "VaryContrastd",
]
