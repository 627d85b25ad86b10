"""What a rendering was made from, kept beside it: the name of a file does not tell."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.runs.files import file_hash, read_json, write_json
from custom.volumes.finished import has_volume
from monai.transforms import Transform

__all__ = ["SaveOrigind", "is_rendered"]

logger = logging.getLogger(__name__)
_FILES = ("label", "template_image", "template_label")
_MAPPED = ("mapped_label", "mapped_template_label")


def _origin(case: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a case, and hashes of its files."""
    return {**case, "hashes": {key: file_hash(case[key]) for key in _FILES if key in case}}


def _record(output_dir: str, name: str) -> Path:
    return Path(output_dir, "records", f"{name}.json")


class SaveOrigind(Transform):
    """Write `<output_dir>/records/<case>.json` when the rendering of a case is written. Changes nothing.

    Args:
        output_dir: of the run.
        cases: all of the run, as :func:`custom.volumes.cases.rendering_cases` gives them.
    """

    def __init__(self, *, output_dir: str, cases: Sequence[Mapping[str, Any]]) -> None:
        self.output_dir, self.cases = output_dir, {case["case"]: case for case in cases}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the record of one case.

        Raises:
            OSError: naming the file that could not be written.
        """
        write_json(_record(self.output_dir, data["case"]), _origin(self.cases[data["case"]]))
        return dict(data)


def is_rendered(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether a case is rendered, whole, and from the files it names; what has no readable record is made again.

    Files may have been moved.

    Raises:
        ValueError: naming the rendering of other files, which would be lost.
    """
    path = _record(output_dir, case["case"])
    if not path.is_file() or not has_volume(case, output_dir):
        return False
    try:
        before, now = read_json(path, "the case is rendered again"), _origin(case)
    except ValueError as error:
        logger.warning("%s", error)
        return False
    if all(before.get(key) == now.get(key) for key in ("hashes", *_MAPPED)):
        return True
    files = ", ".join(str(before.get(key)) for key in _FILES if key in case)
    raise ValueError(
        f"{Path(output_dir, case['case'])}.nii.gz: was rendered from {files}, which were other files or numbered "
        "otherwise; choose another output_dir, or delete it to have it made again"
    )
