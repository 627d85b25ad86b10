"""Segmenters beside each other: tables of what `evaluate.json` of the segmenter wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["COUNTS", "case_differences", "label_differences", "label_table", "paired_table", "read_evaluations"]

COUNTS = ("missed", "invented")
"""Metrics that are 0 or 1 for a label of a case: they add up, where others have a mean."""
_LOWER_IS_BETTER = ("hd95", "betti", *COUNTS)


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
    """Columns and rows of one metric by label: its mean (of COUNTS the sum) over cases, a column an evaluation."""
    labels = next(iter(evaluations.values())).index.unique("label")
    grouped = {name: table[metric].groupby("label") for name, table in evaluations.items()}
    values = {name: cells.sum(min_count=1) if metric in COUNTS else cells.mean() for name, cells in grouped.items()}
    known = pd.DataFrame(values).reindex(labels).dropna(how="all")
    return ["label", *evaluations], [list(row) for row in known.itertuples(name=None)]


def case_differences(table: pd.DataFrame, baseline: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of an evaluation less that of another: a row a case, a column a label; NaN where one lacks it."""
    labels = baseline.index.unique("label")
    change = table[metric].unstack("label") - baseline[metric].unstack("label")
    return change.reindex(columns=labels).dropna(axis=1, how="all")


def label_differences(evaluations: Mapping[str, pd.DataFrame], metric: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the paired differences of one metric from the first evaluation, by label.

    Returns:
        per other evaluation and label: mean difference, its standard deviation over cases (NaN of a single case), and
        in how many cases it is better, of those that can be compared.
    """
    baseline, *others = evaluations
    sign = -1 if metric.startswith(_LOWER_IS_BETTER) else 1
    rows: list[list[Any]] = []
    for name in others:
        for label, change in case_differences(evaluations[name], evaluations[baseline], metric).items():
            known = change.dropna()
            better = f"{int((sign * known > 0).sum())} of {len(known)}"
            rows.append([str(label), name, float(known.mean()), float(known.std()), better])
    return ["label", "segmenter", f"mean minus {baseline}", "SD over cases", "cases better"], rows


def paired_table(
    evaluations: Mapping[str, pd.DataFrame], measures: Sequence[tuple[str, str | None]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of paired differences from the first evaluation.

    Differences are taken where both evaluations define the metric, label by label: else one that has no value for a
    hard case would be compared on the easy ones.

    Args:
        evaluations: at least one.
        measures: (metric, label); the label None takes the mean (of COUNTS the sum) over labels of each case.

    Returns:
        per evaluation and measure: its mean over cases, the mean difference, and in how many cases it is better, of
        those that can be compared; how many cannot be is said.
    """
    baseline = next(iter(evaluations))
    rows: list[list[Any]] = []
    for metric, label in measures:
        by_label = {name: table[metric].unstack("label") for name, table in evaluations.items()}
        if label is not None:
            by_label = {name: values.reindex(columns=[label]) for name, values in by_label.items()}
        sign = -1 if metric.startswith(_LOWER_IS_BETTER) else 1
        for name, values in by_label.items():
            change = _by_case(values - by_label[baseline], metric)
            compared = int(change.notna().sum())
            better = f"{int((sign * change > 0).sum())} of {compared}"
            better += f", {len(change) - compared} not comparable" if compared < len(change) else ""
            title = f"{metric}, {label or 'all labels'}"
            mean = float(_by_case(values, metric).mean())
            rows.append([title, name, mean, float(change.mean()), better if name != baseline else ""])
    return ["measure", "segmenter", "mean", f"minus {baseline}", "cases better"], rows


def _by_case(values: pd.DataFrame, metric: str) -> pd.Series:
    """One value a case from one a label; NaN where no label has any."""
    return values.sum(axis=1, min_count=1) if metric in COUNTS else values.mean(axis=1)
