"""Segmenters beside each other: tables of what `evaluate.json` of the segmenter wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["label_table", "paired_table", "read_evaluations"]

_LOWER_IS_BETTER = ("hd95", "betti")


def read_evaluations(evaluations: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """Tables of finished evaluations.

    Args:
        evaluations: name -> folder with `labels.csv`; the first is what the others are compared with.

    Returns:
        name -> metrics, indexed by case and label; NaN where they are not defined.

    Raises:
        FileNotFoundError: naming a folder without a table.
        ValueError: when they are not of the same cases and labels.
    """
    read: dict[str, pd.DataFrame] = {}
    for name, folder in evaluations.items():
        path = Path(folder) / "labels.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no evaluation of {name!r}; run evaluate.json of the segmenter first")
        cells = pd.read_csv(path, dtype=str, keep_default_na=False).set_index(["case", "label"])
        read[name] = cells.replace("", "nan").astype(float)
        first = next(iter(read))
        if set(read[name].index) != set(read[first].index):
            raise ValueError(f"{path}: its cases or labels are not those of {first!r}; evaluate on the same test cases")
    return read


def label_table(evaluations: Mapping[str, pd.DataFrame], metric: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of one metric: its mean over cases by label, a column for each evaluation."""
    labels = next(iter(evaluations.values())).index.unique("label")
    means = pd.DataFrame({name: table[metric].groupby("label").mean() for name, table in evaluations.items()})
    known = means.reindex(labels).dropna(how="all")
    return ["label", *evaluations], [list(row) for row in known.itertuples(name=None)]


def paired_table(
    evaluations: Mapping[str, pd.DataFrame], measures: Sequence[tuple[str, str | None]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of paired differences from the first evaluation.

    Args:
        evaluations: at least one.
        measures: (metric, label); the label None takes the mean over labels of each case.

    Returns:
        per evaluation and measure: its mean over cases, the mean difference, and in how many cases it is better.
    """
    baseline = next(iter(evaluations))
    rows: list[list[Any]] = []
    for metric, label in measures:
        by_label = {name: table[metric].unstack("label") for name, table in evaluations.items()}
        by_case = {
            name: (values if label is None else values.reindex(columns=[label])).mean(axis=1)
            for name, values in by_label.items()
        }
        sign = -1 if metric.startswith(_LOWER_IS_BETTER) else 1
        for name, values in by_case.items():
            change = values - by_case[baseline]
            better = f"{int((sign * change > 0).sum())} of {len(values)}" if name != baseline else ""
            title = f"{metric}, {label or 'all labels'}"
            rows.append([title, name, float(values.mean()), float(change.mean()), better])
    return ["measure", "segmenter", "mean", f"minus {baseline}", "cases better"], rows
