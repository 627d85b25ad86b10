"""Cross-validation: every case tests once, and nothing of a fold has seen its test case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from custom.evaluation.comparison import COUNTS, paired_table
from custom.runs.files import write_json, write_table
from custom.study.stages import ARMS

logger = logging.getLogger(__name__)

_MEASURES = ("dice", "cl_dice", "hd95_mm", *COUNTS)


def write_folds(cases: Sequence[Mapping[str, Any]], root: Path, folds: int) -> list[Path]:
    """Datalists of all folds, `fold_1/datalist.json` and so on.

    Fold k tests every `folds`-th case from case k on; the next case validates, all others teach.

    Args:
        cases: all, as `custom.study.cases` gives them; their sections do not count.
        root: folder of the study.
        folds: 2 to the number of cases.

    Raises:
        ValueError: when there cannot be so many folds.
    """
    if not isinstance(folds, int) or not 2 <= folds <= len(cases):
        raise ValueError(f"folds: must be 2 to the number of cases, {len(cases)}, got {folds!r}")
    paths = []
    for fold in range(folds):
        test = [case for k, case in enumerate(cases) if k % folds == fold]
        others = [case for k, case in enumerate(cases) if k % folds != fold]
        if len(others) < 2:
            raise ValueError(f"folds: {folds} of {len(cases)} cases leave none to learn from; take more folds or cases")
        first = next((k for k, case in enumerate(others) if cases.index(case) > fold), 0)
        sections = {"training": others[:first] + others[first + 1 :], "validation": [others[first]], "test": test}
        listed = {name: [_entry(case) for case in items] for name, items in sections.items()}
        paths.append(root / f"fold_{fold + 1}" / "datalist.json")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        write_json(paths[-1], listed)
    return paths


def _entry(case: Mapping[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in ("image", "label", "mapped_label", "weight") if key in case}


def summarise(folders: Sequence[Path], root: Path) -> str:
    """Gather the evaluations of all folds; write `cross_validation.csv` and, by label, `cross_validation_labels.csv`.

    A case is named with its fold: alone in its list, it has the bare name of its file, which others may have too.

    Returns:
        the first table: mean and SD over cases of every measure, and of the paired differences of the first two.
    """
    read: dict[str, pd.DataFrame] = {}
    for arm, name in ARMS.items():
        if name == "shipped" and not (folders[0] / name).is_dir():
            continue
        parts = [pd.read_csv(folder / name / "evaluation/labels.csv", dtype={"case": str}) for folder in folders]
        named = [part.assign(case=f"{k}/" + part["case"]) for k, part in enumerate(parts, start=1)]
        read[arm] = pd.concat(named, ignore_index=True).set_index(["case", "label"])
    first, second, *_ = read.values()
    rows = []
    labels = [None, *first.index.unique("label")]
    for measure in _MEASURES:
        columns, values = paired_table(read, [(measure, label) for label in labels])
        for row in values:
            rows.append(dict(zip(columns, row, strict=True)))
    spread = {
        (arm, measure): table[measure].groupby("case").mean() for arm, table in read.items() for measure in _MEASURES
    }
    overall = [
        {
            "measure": measure,
            **{f"{arm}, mean": spread[arm, measure].mean() for arm in read},
            **{f"{arm}, sd": spread[arm, measure].std() for arm in read},
            "difference, mean": (second[measure] - first[measure]).groupby("case").mean().mean(),
            "difference, sd": (second[measure] - first[measure]).groupby("case").mean().std(),
        }
        for measure in _MEASURES
    ]
    write_table(root / "cross_validation.csv", overall)
    write_table(root / "cross_validation_labels.csv", rows)
    return pd.DataFrame(overall).round(3).to_string(index=False)
