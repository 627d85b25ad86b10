"""The list of masks that a run makes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.volumes.cases import check_names

RECORDS, MASKS, IMAGES, PREPARED = "records", "masks", "images", "prepared"


def generation_cases(
    references: Sequence[Mapping[str, Any]], output_dir: str, *, count: int, neighbours: int
) -> list[dict[str, Any]]:
    """One case for each new mask: mask k is made from reference k modulo their number, whatever the count.

    Args:
        references: cases of `load_cases`, with `label` and `case`.
        output_dir: of the run; prepared references lie in its `prepared/`.
        count: masks to make, at least 1.
        neighbours: so many references that follow the source are registered with it.

    Returns:
        `case`, `index`, `label` (prepared source), `neighbours` (prepared files), `source` (file it was prepared from)
        and, when the references have one, `image`; those of one source follow one another.

    Raises:
        ValueError: if `count` is below 1, `neighbours` negative, or two references have one name.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; it is the number of masks to make.")
    if neighbours < 0:
        raise ValueError(f"neighbours must not be negative, got {neighbours}.")
    check_names(references, "references")
    total = len(references)
    prepared = [os.path.join(output_dir, PREPARED, f"{case['case']}.nii.gz") for case in references]
    cases = []
    for index in range(count):
        source = index % total
        others = [(source + step) % total for step in range(1, min(neighbours, total - 1) + 1)]
        case = {
            "case": f"mask_{index:04d}",
            "index": index,
            "label": prepared[source],
            "neighbours": [prepared[other] for other in others],
            "source": references[source]["label"],
        }
        cases.append(case | {key: references[source][key] for key in ("image",) if key in references[source]})
    return sorted(cases, key=lambda case: case["index"] % total)


def is_made(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether a mask has a record, and its files where it was accepted."""
    root = Path(output_dir)
    record = root / RECORDS / f"{case['case']}.json"
    folders = [MASKS, IMAGES][: 1 + ("image" in case)]
    return record.exists() and (
        not json.loads(record.read_text())["accepted"]
        or all((root / folder / f"{case['case']}.nii.gz").exists() for folder in folders)
    )
