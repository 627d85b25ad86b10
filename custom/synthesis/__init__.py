"""Synthetic data sets: which mask from which template, what is written, the report."""

from custom.synthesis.cases import is_whole, synthesis_cases
from custom.synthesis.judging import JudgeRenderingd
from custom.synthesis.report import write_report
from custom.synthesis.writing import SaveSyntheticd, make_synthetic_set

__all__ = ["JudgeRenderingd", "SaveSyntheticd", "is_whole", "make_synthetic_set", "synthesis_cases", "write_report"]
