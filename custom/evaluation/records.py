"""Records of a synthetic set, one a case: read, and held against the files that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.runs.files import file_hash, read_json

__all__ = ["OF_A_RECORD", "read_record", "read_records", "read_set"]

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
) -> list[dict[str, Any]]:
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


def read_set(output_dir: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """A finished synthesis: records of the cases kept, sorted by score, and of those rejected, and its provenance.

    Args:
        output_dir: of the synthesis.

    Raises:
        FileNotFoundError: when there is none, or a template is gone.
        ValueError: naming a list, record or file that is damaged, or a template that has changed; also when no case was
            made.
    """
    listing, again = Path(output_dir, "datalist.json"), "run `synthesizing` again, which writes it anew"
    if not listing.exists():
        raise FileNotFoundError(f"{listing}: no synthetic data set; run synthesize.json first")
    content = read_json(listing, again)
    for key, kind in {"training": list, "rejected": list, "provenance": dict}.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(
                f"{listing}: is damaged ({key} must be there and whole, got {content.get(key)!r}); {again}"
            )
    needed = {key: inner for key, inner in OF_A_RECORD.items() if key not in ("files", "mask_hash")}
    kept, rejected = (read_records(listing.parent, content[section], needed) for section in ("training", "rejected"))
    if not kept + rejected:
        raise ValueError(f"{listing}: the data set is empty; there is nothing to report")
    _check_templates([*kept, *rejected], content["provenance"].get("templates", {}))
    return sorted(kept, key=lambda record: record["score_hu"]), rejected, content["provenance"]


def _check_templates(records: Sequence[Mapping[str, Any]], hashes: Mapping[str, str]) -> None:
    """Refuse templates that are gone or are not what they were; older sets have no hashes."""
    for file in sorted({record["template"][key] for record in records for key in ("image", "label")}):
        now = file_hash(file)
        if now != hashes.get(file, now):
            raise ValueError(
                f"{file}: this template has changed since the set was made from it; bring back what it was, or run "
                "`synthesizing` again into another output_dir"
            )
