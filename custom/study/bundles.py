"""Where the two bundles are, and how a run of one is typed."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from custom.volumes.anatomy import Anatomy
from monai.bundle import ConfigParser

GENERATOR, SEGMENTER = "structdiff_cardiac", "structdiff_seg_cal"
_LISTED = re.compile(r"[^\"$`\\!]*'[^\"$`\\!]*")  # lists and dictionaries are easier to read in double quotes
ROOT = Path(__file__).resolve().parents[2]
"""Folder of the package: of a clone, or of a downloaded bundle."""


@dataclass(frozen=True)
class Bundles:
    """Both bundles, and a config of the user's that every run gets last.

    Attributes:
        generator, segmenter: bundle roots.
        overrides: JSON file, or None.
    """

    generator: Path
    segmenter: Path
    overrides: Path | None = None

    def command(self, bundle: Path, entry: str, configs: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Arguments of python for one run.

        Args:
            bundle: its root.
            entry: what is run: "training", "generating", ...
            configs: names in its `configs`; a later one overrides the earlier.
            options: name -> value, written as Python writes it.
        """
        files = [str(bundle / "configs" / name) for name in configs]
        files += [] if self.overrides is None else [str(self.overrides)]
        config = files[0] if len(files) == 1 else str(files)
        given = {"bundle_root": bundle, "config_file": config, **options}
        typed = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return ["-m", "monai.bundle", "run", entry, *typed]

    def labels(self) -> tuple[Anatomy, Mapping[str, Sequence[int]]]:
        """The label table and the renumbering of label maps that all stages work with."""
        parser = ConfigParser()
        own = [] if self.overrides is None else [str(self.overrides)]
        parser.read_config([str(self.generator / "configs/generate_masks.json"), *own])
        return parser.get_parsed_content("labels"), parser.get_parsed_content("label_mapping")

    def shipped_segmenter(self) -> Path | None:
        """Weights that the segmenter comes with; None where overrides make another network of it, or other labels."""
        weights = self.segmenter / "models/model.pt"
        return weights if weights.is_file() and (self.overrides is None or self._same_segmenter()) else None

    def _same_segmenter(self) -> bool:
        """Whether overrides leave the network of the segmenter and the names of its labels as they are."""
        assert self.overrides is not None
        if any(name.split("#")[0] == "network_def" for name in json.loads(self.overrides.read_text())):
            return False
        return self.labels()[0].names == replace(self, overrides=None).labels()[0].names


def find_bundles(folder: str | None = None, overrides: str | None = None) -> Bundles:
    """Both bundles: in a clone, or as they were downloaded, beside each other.

    Args:
        folder: that holds both; None looks where this package lies.
        overrides: JSON file of the user's that every run gets last.

    Raises:
        FileNotFoundError: naming where they were looked for.
        ValueError: when `overrides` is no JSON dictionary.
    """
    places = [ROOT / "bundles", ROOT.parent] if folder is None else [Path(folder).expanduser().resolve()]
    own = None if overrides is None else Path(overrides).expanduser().resolve()
    if own is not None:
        try:
            is_config = isinstance(json.loads(own.read_text()), dict)
        except ValueError:
            is_config = False
        if not is_config:
            raise ValueError(f"overrides: {own} must be a JSON dictionary of options, as a config of a bundle is")
    for place in places:
        if all((place / name / "configs/metadata.json").is_file() for name in (GENERATOR, SEGMENTER)):
            return Bundles(place / GENERATOR, place / SEGMENTER, own)
    raise FileNotFoundError(
        f"bundles: {GENERATOR} and {SEGMENTER} must lie in one folder, looked in {', '.join(map(str, places))}; put "
        "them beside each other, or name the folder: --bundles FOLDER"
    )


def typed(arguments: Sequence[str]) -> str:
    """The line that a user could type."""
    return " ".join(["python", *(f'"{part}"' if _LISTED.fullmatch(part) else shlex.quote(part) for part in arguments)])


def environment() -> dict[str, str]:
    """Of a run: this package first on the path, cores shared, and bars that do not fill a log."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", "TQDM_MININTERVAL": "60"}
