"""Synthetic data sets: which mask from which template, what is written, the report."""

from custom.synthesis.cases import incomplete, synthesis_cases
from custom.synthesis.report import write_report
from custom.synthesis.writing import JudgeRenderingd, SaveSyntheticd, write_synthetic_datalist

__all__ = [
    "JudgeRenderingd",
    "SaveSyntheticd",
    "incomplete",
    "synthesis_cases",
    "write_report",
    "write_synthetic_datalist",
]
