"""The list of masks that a run makes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from custom.runs.files import read_json
from custom.volumes.cases import check_names
from custom.volumes.finished import is_whole_volume, unfinished

logger = logging.getLogger(__name__)

RECORDS, MASKS, IMAGES, PREPARED = "records", "masks", "images", "prepared"
_OF_A_REFUSAL = {"case", "accepted", "reason"}
_OF_A_MASK = {
    *("case", "accepted", "source", "retries", "scale", "min_det_jacobian", "dice_to_references", "volume_ml"),
    *("betti", "wall_thickness_mm", "vessels"),
}


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


class UnfinishedCases(Sequence):
    """What :func:`custom.volumes.cases.unfinished` gives, but looked up when it is first asked for.

    That is after the folder is claimed, which may remove what an earlier run left there.

    Args:
        cases, output_dir, options: as there.
    """

    def __init__(self, cases: Sequence[dict[str, Any]], output_dir: str, **options: Any) -> None:
        self.cases, self.output_dir, self.options = cases, output_dir, options

    @cached_property
    def _found(self) -> list[dict[str, Any]]:
        return unfinished(self.cases, self.output_dir, **self.options)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]


def is_made(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether a mask has a record, and its files, whole, where it was accepted; what is damaged is made again."""
    root = Path(output_dir)
    record = root / RECORDS / f"{case['case']}.json"
    folders = [MASKS, IMAGES][: 1 + ("image" in case)]
    if not record.exists():
        return False
    try:
        content = read_json(record, "the mask is made again")
        if absent := sorted((_OF_A_MASK if content.get("accepted") else _OF_A_REFUSAL) - content.keys()):
            raise ValueError(f"{record}: is damaged (it has no {absent}); the mask is made again")
    except ValueError as error:
        logger.warning("%s", error)
        return False
    return not content["accepted"] or all(
        is_whole_volume(root / folder / f"{case['case']}.nii.gz") for folder in folders
    )
