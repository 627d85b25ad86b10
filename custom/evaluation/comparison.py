"""Segmenters beside each other: tables of what `evaluate.json` of the segmenter wrote."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["label_table", "paired_table", "read_evaluations"]

Values = dict[tuple[str, str], dict[str, float]]
"""(case, label) -> metric -> value, NaN where it is not defined."""
_LOWER_IS_BETTER = ("hd95", "betti")


def read_evaluations(evaluations: Mapping[str, str]) -> dict[str, Values]:
    """Tables of finished evaluations.

    Args:
        evaluations: name -> folder with `labels.csv`; the first is what the others are compared with.

    Raises:
        FileNotFoundError: naming a folder without a table.
        ValueError: when they are not of the same cases and labels.
    """
    read: dict[str, Values] = {}
    for name, folder in evaluations.items():
        path = Path(folder) / "labels.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no evaluation of {name!r}; run evaluate.json of the segmenter first")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        read[name] = {
            (row.pop("case"), row.pop("label")): {k: float(v) if v else float("nan") for k, v in row.items()}
            for row in rows
        }
        first = next(iter(read))
        if set(read[name]) != set(read[first]):
            raise ValueError(f"{path}: its cases or labels are not those of {first!r}; evaluate on the same test cases")
    return read


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def label_table(evaluations: Mapping[str, Values], metric: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of one metric: its mean over cases by label, a column for each evaluation."""
    labels = list(dict.fromkeys(label for values in evaluations.values() for _, label in values))
    rows: list[list[Any]] = []
    for label in labels:
        own = [[v[metric] for (_, k), v in values.items() if k == label] for values in evaluations.values()]
        rows.append([label, *map(_mean, own)])
    return ["label", *evaluations], [row for row in rows if not all(np.isnan(v) for v in row[1:])]


def paired_table(
    evaluations: Mapping[str, Values], measures: Sequence[tuple[str, str | None]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of paired differences from the first evaluation.

    Args:
        evaluations: at least one.
        measures: (metric, label); the label None takes the mean over labels of each case.

    Returns:
        per evaluation and measure: its mean over cases, the mean difference, and in how many cases it is better.
    """
    baseline = next(iter(evaluations))
    cases = list(dict.fromkeys(case for case, _ in evaluations[baseline]))
    rows: list[list[Any]] = []
    for metric, label in measures:
        by_case = {
            name: [
                _mean([v[metric] for (c, k), v in values.items() if c == case and label in (None, k)]) for case in cases
            ]
            for name, values in evaluations.items()
        }
        sign = -1 if metric.startswith(_LOWER_IS_BETTER) else 1
        for name, values in by_case.items():
            change = np.subtract(values, by_case[baseline])
            better = f"{int((sign * change > 0).sum())} of {len(cases)}" if name != baseline else ""
            rows.append([f"{metric}, {label or 'all labels'}", name, _mean(values), _mean(list(change)), better])
    return ["measure", "segmenter", "mean", f"minus {baseline}", "cases better"], rows
