"""StructDiff: template-guided diffusion of CT volumes."""

from custom.diffusion.grain import AddGraind, MeasureGraind, SplitNoised
from custom.diffusion.loss import StructDiffLoss
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.pairs import PooledDataLoader, RandTemplatePaird
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.training import HeldOutLoss, MomentsFirst, PrepareRendering, PrepareResidualDiffusion
from custom.diffusion.transforms import AlignTemplated, LabelStatisticsd, PaintPriord, RandPaintPriord, VaryContrastd

__all__ = [
    "AddGraind",
    "AlignTemplated",
    "HeldOutLoss",
    "LabelStatisticsd",
    "MeasureGraind",
    "MomentsFirst",
    "PaintPriord",
    "PooledDataLoader",
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
