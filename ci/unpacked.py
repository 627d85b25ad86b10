"""Packed bundles, extracted for checks and tests."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import package

SCHEMA = package.ROOT.parent / "shared/schema/meta_schema_20240725.json"
"""Where the schema of the metadata is looked for; another place is an option of the checks."""


class Bundle(NamedTuple):
    """An unpacked bundle.

    Attributes:
        root: its folder.
        work: holds `data` of `bundle_cases.make_data`; results go below it.
        schema: of the metadata.
    """

    root: Path
    work: Path
    schema: Path

    @property
    def metadata(self) -> dict[str, Any]:
        """Content of `configs/metadata.json`."""
        return json.loads((self.root / "configs/metadata.json").read_text())

    def config(self, name: str) -> str:
        """Path of a config."""
        return str(self.root / "configs" / name)

    def has_weights(self) -> bool:
        """Whether it was packed with weights."""
        return (self.root / package.WEIGHTS).is_file()


def unpack(archive: Path, work: Path, schema: Path) -> Bundle:
    """Check a zip and extract it.

    Args:
        archive: `NAME.zip` that `ci/package.py build` wrote.
        work: gets the folder NAME.
        schema: of the metadata.

    Raises:
        FileNotFoundError, ValueError: as :func:`package.check`.
    """
    package.check(str(archive))
    with zipfile.ZipFile(archive) as file:
        file.extractall(work)
    return Bundle(work / archive.stem, work, schema)
