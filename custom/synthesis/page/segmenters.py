"""Segmenters of the report: label by label, with the differences of every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from custom.evaluation.comparison import (
    COUNTS,
    case_differences,
    label_differences,
    label_table,
    paired_table,
    read_evaluations,
)
from custom.synthesis.page.assembling import Picture
from custom.synthesis.page.plots import difference_picture

__all__ = ["segmenter_section"]


def _differences(read: Mapping[str, pd.DataFrame], vessel_names: Sequence[str]) -> list[Picture]:
    """A picture for each other segmenter and measure: Dice of all labels, clDice of the vessels."""
    baseline, *others = read
    found = []
    for name in others:
        for metric, title in (("dice", "Dice"), ("cl_dice", "clDice of the centre lines")):
            values = case_differences(read[name], read[baseline], metric)
            values = values if metric == "dice" else values.reindex(columns=vessel_names).dropna(axis=1, how="all")
            if values.size:
                caption = f"{title}: {name} minus {baseline}"
                found.append(Picture("png", difference_picture(values, caption), caption))
    return found


def segmenter_section(evaluations: Mapping[str, str], vessel_names: Sequence[str]) -> dict[str, Any]:
    """What segmenters reach on test cases: tables, plots of differences, and their pictures of the first case.

    Args:
        evaluations: name -> output folder of `evaluate.json` of the segmenter; others are compared with the first.
        vessel_names: labels of which more is shown.

    Raises:
        FileNotFoundError, ValueError: of :func:`custom.evaluation.comparison.read_evaluations`.
    """
    read = read_evaluations(evaluations)
    counts = [metric for metric in COUNTS if all(metric in table for table in read.values())]  # not before version 0.4
    measures: list[tuple[str, str | None]] = [("dice", None), *((metric, None) for metric in counts)]
    measures += [(metric, name) for name in vessel_names for metric in ("dice", "cl_dice", "hd95_mm", "betti_error_0")]
    cases = sorted(next(iter(read.values())).index.unique("case"))
    files = {name: Path(folder) / "pictures" / f"{cases[0]}.png" for name, folder in evaluations.items()}
    pictures = [
        Picture("png", file.read_bytes(), f"{name}: {cases[0]}") for name, file in files.items() if file.exists()
    ]
    return {
        "cases": len(cases),
        "paired": paired_table(read, measures),
        "dice": label_table(read, "dice"),
        "differences": label_differences(read, "dice"),
        "counts": [(metric, *label_table(read, metric)) for metric in counts],
        "plots": _differences(read, vessel_names),
        "pictures": pictures,
    }
