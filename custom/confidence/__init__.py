"""Skip-sampling variance (SSV) and what else says how far a voxel can be trusted."""

from custom.confidence.inferers import PredictedVarianceInferer, SkipSamplingInferer
from custom.confidence.table import CalibrateConfidence
from custom.confidence.transforms import EstimateConfidenced, SplitVarianced, TrustPaintedd

__all__ = [
    "CalibrateConfidence",
    "EstimateConfidenced",
    "PredictedVarianceInferer",
    "SkipSamplingInferer",
    "SplitVarianced",
    "TrustPaintedd",
]
