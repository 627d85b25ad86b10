"""StructDiff: template-guided diffusion of CT volumes."""

from custom.diffusion.coarse import CoarseUNet
from custom.diffusion.coarse_transforms import Coarsend, DrawCoarsed, RandCoarsePaird, Surroundingsd
from custom.diffusion.grain import AddGraind, MeasureGraind, NominalAppearanced, SplitNoised
from custom.diffusion.loss import StructDiffLoss
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.painted_transforms import PaintedInferer, PaintTissuesd
from custom.diffusion.pairs import PooledDataLoader, RandTemplatePaird
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.training import (
    HeldOutLoss,
    MomentsFirst,
    PrepareRendering,
    PrepareResidualDiffusion,
    PrepareVelocity,
)
from custom.diffusion.transforms import AlignTemplated, LabelStatisticsd, PaintPriord, RandPaintPriord, VaryContrastd

__all__ = [
    "AddGraind",
    "AlignTemplated",
    "CoarseUNet",
    "Coarsend",
    "DrawCoarsed",
    "HeldOutLoss",
    "LabelStatisticsd",
    "MeasureGraind",
    "MomentsFirst",
    "NominalAppearanced",
    "PaintPriord",
    "PaintTissuesd",
    "PaintedInferer",
    "PooledDataLoader",
    "PrepareRendering",
    "PrepareResidualDiffusion",
    "PrepareVelocity",
    "RandCoarsePaird",
    "RandPaintPriord",
    "RandTemplatePaird",
    "SplitNoised",
    "StructDiffInferer",
    "StructDiffLoss",
    "StructDiffUNet",
    "Surroundingsd",
    "VaryContrastd",
]
