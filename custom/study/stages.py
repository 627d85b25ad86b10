"""A stage of a study, what a user decides of one, and what all stages have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from custom.runs.options import is_number
from custom.study.bundles import Bundles
from custom.study.cases import label_sizes

ARMS = {"real cases only": "real_only", "CAL, then real cases": "cal", "as shipped": "shipped"}
"""Segmenters that are compared: in words, and the folder of each; the last where the study starts from it."""
MODES = ("template", "painted")
"""Ways to make images that a study offers."""
_EPOCH = re.compile(r"Epoch: (\d+)/(\d+), Iter: (\d+)/(\d+)")
_USUAL = (256.0**3, 0.56**3)  # voxels, and mm^3 of one, where no file tells
_SPACINGS_MM = (0.5, 3.0)  # ours: finer masks are more than the generator draws, coarser ones hold no coronaries


@dataclass(frozen=True)
class Stage:
    """One command of a study.

    Attributes:
        name: also of its log and of its note that it is done.
        title: what it does, in words.
        command: arguments of python.
        product: file that it leaves.
        seconds: first guess of how long it takes.
        needs: names of stages that it works on the results of.
        share: how much of it is done, 0 to 1, by its log and what it has written; None where that cannot be told.
    """

    name: str
    title: str
    command: Sequence[str]
    product: Path
    seconds: float
    needs: Sequence[str] = ()
    share: Callable[[Path], float | None] = lambda log: None


def trained(log: Path) -> float | None:
    """Share of a training that its log tells of; None before the first step."""
    found = _EPOCH.findall(log.read_text(errors="replace")) if log.is_file() else []
    if not found:
        return None
    epoch, epochs, step, steps = map(int, found[-1])
    return (epoch - 1 + step / steps) / epochs


@dataclass(frozen=True)
class Settings:
    """What a user decides of a study.

    Attributes:
        count: new masks, each rendered once.
        epochs: of the segmenter on real cases alone; with pre-training two thirds of them are its.
        finetune: epochs for which the generator is trained on with the cases; 0 takes the shipped one as it is.
        workers: processes that make masks.
        seed: of all stages.
        spacing_mm: voxel size of new masks and their images.
        mode: "template", images by the network, or "painted", in drawn HU without one.
        pretrained: whether segmenters start from the shipped weights, where these know the labels, or from nothing.
    """

    count: int = 30
    epochs: int = 150
    finetune: int = 0
    workers: int = 2
    seed: int = 0
    spacing_mm: float = 0.8
    mode: str = "template"
    pretrained: bool = True

    def __post_init__(self) -> None:
        least = {"count": 1, "epochs": 3, "finetune": 0, "workers": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(
                    f"{name}: must be a whole number, at least {low}, got {value!r}; for example {low + 1}"
                )
        if not is_number(self.spacing_mm) or not _SPACINGS_MM[0] <= self.spacing_mm <= _SPACINGS_MM[1]:
            raise ValueError(
                f"spacing_mm: must be {_SPACINGS_MM[0]} to {_SPACINGS_MM[1]}, got {self.spacing_mm!r}; images are best "
                "from 0.8 to 1.5"
            )
        if not isinstance(self.pretrained, bool):
            raise ValueError(
                "pretrained: must be True, segmenters start from the shipped weights, or False, from nothing; got "
                f"{self.pretrained!r}"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.finetune and self.is_painted:
            raise ValueError(
                f"finetune: must be 0 in mode painted, which uses no network that could be trained, got {self.finetune}"
            )

    @property
    def is_painted(self) -> bool:
        """Whether no network makes the images."""
        return self.mode == "painted"


@dataclass(frozen=True)
class Study:
    """What all stages have in common.

    Attributes:
        bundles: both.
        datalist: JSON with "training", "validation" and "test".
        root: folder of all results.
        settings: of the study.
        cases: section -> its cases.
    """

    bundles: Bundles
    datalist: Path
    root: Path
    settings: Settings
    cases: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def sizes(self) -> dict[str, int]:
        """Section -> number of cases."""
        return {section: len(cases) for section, cases in self.cases.items()}

    @cached_property
    def _volumes(self) -> list[tuple[float, float]]:
        """Voxels of the label maps that can be read, and the volume of one in mm^3."""
        return label_sizes([case for cases in self.cases.values() for case in cases]) or [_USUAL]

    @property
    def megavoxels(self) -> float:
        """Millions of voxels of a case, on average."""
        return float(np.mean([voxels for voxels, _ in self._volumes])) / 1e6

    @property
    def field_ml(self) -> float:
        """Field of view of a case in ml, on average."""
        return float(np.mean([voxels * volume for voxels, volume in self._volumes])) / 1000

    @cached_property
    def shipped(self) -> Path | None:
        """Weights that both segmenters start from; None from nothing."""
        return self.bundles.shipped_segmenter() if self.settings.pretrained else None

    def inputs(self) -> list[Path]:
        """Files that all results depend on."""
        files = [case[key] for cases in self.cases.values() for case in cases for key in ("image", "label")]
        own = [] if self.bundles.overrides is None else [self.bundles.overrides]
        weights = [self.bundles.generator / "models/model.pt"] * (not self.settings.is_painted)
        weights += [] if self.shipped is None else [self.shipped]
        return [self.datalist, *own, *weights, *map(Path, files)]

    def stage(
        self, name: str, title: str, run: tuple[Path, str, Sequence[str]], options: Mapping[str, Any], **more: Any
    ) -> Stage:
        """One run of a bundle.

        Args:
            name, title: of the stage.
            run: bundle, what is run of it, names of configs.
            options: of the run; the seed is added.
            more: of the stage; its product is named below the root.
        """
        command = self.bundles.command(*run, {**options, "seed": self.settings.seed})
        return Stage(name, title, command, self.root / more.pop("product"), **more)
