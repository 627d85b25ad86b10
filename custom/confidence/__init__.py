"""Skip-sampling variance (SSV) and what else says how far a voxel can be trusted."""

from custom.confidence.inferers import PredictedVarianceInferer, SkipSamplingInferer
from custom.confidence.table import CalibrateConfidence
from custom.confidence.transforms import Confidenced, SplitVarianced

__all__ = ["CalibrateConfidence", "Confidenced", "PredictedVarianceInferer", "SkipSamplingInferer", "SplitVarianced"]
