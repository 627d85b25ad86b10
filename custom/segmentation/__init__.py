"""Confidence-aware adaptive learning (CAL) of a segmenter."""

from custom.segmentation.cases import pretraining_cases
from custom.segmentation.loss import CALLoss, class_weights
from custom.segmentation.schedule import ConfidenceSchedule
from custom.segmentation.transforms import PrepareConfidence

__all__ = ["CALLoss", "ConfidenceSchedule", "PrepareConfidence", "class_weights", "pretraining_cases"]
