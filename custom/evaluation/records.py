"""Records of a synthetic set, one a case: read, and held against the files that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.runs.files import file_hash, read_json

__all__ = ["OF_A_RECORD", "read_record", "read_records"]

_AGAIN = "run `synthesizing` again, which makes it anew"
_TYPES: dict[str, type | tuple[type, ...]] = {"case": str, "mask_hash": str, "rejected": list, "score_hu": (int, float)}
OF_A_RECORD: dict[str, set[str]] = {
    "case": set(),
    "files": set(),
    "mask_hash": set(),
    "measures": {"label_error_hu", "vessel_contrast", "vessel_continuity", "template_copy"},
    "paths": {"image", "label", "confidence"},
    "rejected": set(),
    "score_hu": set(),
    "template": {"image", "label"},
}
"""Entry of a record -> what it holds at least, where it is a dictionary."""


def read_record(root: Path, name: str, needed: Mapping[str, set[str]]) -> dict[str, Any]:
    """Record of a case of a synthetic set, whose files are as they were when it was written.

    Args:
        root: of the set.
        name: of the record in it.
        needed: of `OF_A_RECORD`.

    Raises:
        ValueError: naming a record or file that is missing or damaged.
    """
    if not (root / name).is_file():
        raise ValueError(f"{root / name}: is missing; {_AGAIN}")
    content = read_json(root / name, _AGAIN)
    for key, inner in {**needed, **({"files": set()} if "files" in content else {})}.items():
        value = content.get(key)
        if not isinstance(value, _TYPES.get(key, dict)) or not inner <= set(value if isinstance(value, dict) else ()):
            raise ValueError(f"{root / name}: is damaged ({key} must be there and whole, got {value!r}); {_AGAIN}")
    for file, digest in content.get("files", {}).items():
        if not (root / file).is_file() or file_hash(str(root / file)) != digest:
            raise ValueError(f"{root / file}: is missing or damaged, it is not what {name} describes; {_AGAIN}")
    return content


def read_records(
    root: Path, cases: Sequence[Mapping[str, Any]], needed: Mapping[str, set[str]]
) -> list[Mapping[str, Any]]:
    """:func:`read_record` of all cases of a synthetic set.

    Raises:
        ValueError: also when a case has no record, as those of other lists.
    """
    for case in cases:
        if not isinstance(case, Mapping) or not isinstance(case.get("record"), str):
            raise ValueError(
                f"output_dir {root}: must hold a set that `synthesizing` has made, but a case of its datalist.json has "
                f"no record: {case}"
            )
    return [read_record(root, case["record"], needed) for case in cases]
