"""Layer 2: the confidence of every voxel: from the variance of renderings, the tables that scale it, and read back."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.transforms import Compose, EnsureChannelFirstd, Transform
from monai.utils import CommonKeys as Keys

from custom.checks import LoadVolumesd, check_grid, file_of
from custom.losses import CALLoss
from custom.records import content_hash, plain_values, write_json
from custom.transforms import plain
from custom.uncertainty import confidence, sample_score, tau_table

logger = logging.getLogger(__name__)

_VOXELS_OF_A_LABEL = 50_000


class LoadConfidenced(Transform):
    """Read `confidence` of a case on the grid of its `label`; a case without one is trusted everywhere.

    Raises:
        ValueError: naming the file, when it is on another grid, not between 0 and 1, or has several channels.
    """

    def __init__(self) -> None:
        self.load = Compose([LoadVolumesd("confidence"), EnsureChannelFirstd("confidence")])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add `confidence` (1, H, W, D) to an item whose label is (1, H, W, D)."""
        item = dict(data)
        if "confidence" not in item:
            item["confidence"] = torch.ones_like(item["label"], dtype=torch.float32)
            return item
        item = self.load(item)
        low, high = float(item["confidence"].min()), float(item["confidence"].max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(
                f"{file_of(item['confidence'])}: confidence must lie between 0 and 1, got {low:g} to {high:g}"
            )
        if len(item["confidence"]) != 1:
            raise ValueError(
                f"{file_of(item['confidence'])}: confidence must be one volume, got {len(item['confidence'])} channels"
            )
        check_grid(item["label"], item["confidence"])
        return item


class SplitVarianced(Transform):
    """Split `pred` (2, H, W, D) into `pred`, the image, and `variance`, both (1, H, W, D)."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split one item."""
        return {**data, "pred": data["pred"][:1], "variance": data["pred"][1:]}


class Confidenced(Transform):
    """Add `confidence` (1, H, W, D) and `score` (HU) from `variance` and `label`.

    Args:
        table: JSON file of :class:`CalibrateConfidence`.
        made_with: what the variance depends on: weights, spacing and so on; the table must agree with all of it.
        c_min: smallest confidence.

    Raises:
        FileNotFoundError: when there is no table.
        ValueError: when it was made with something else.
    """

    def __init__(self, table: str, *, made_with: Mapping[str, Any], c_min: float = 0.05) -> None:
        path = Path(table)
        if not path.is_file():
            raise FileNotFoundError(f"{table}: no confidence table; run calibrate.json with these weights first")
        content = json.loads(path.read_text())
        for key, value in plain_values(made_with).items():
            if content.get(key) != value:
                raise ValueError(f"{table}: was made with {key} {content.get(key)}, not {value}; calibrate anew")
        self.tau, self.c_min = torch.tensor(content["tau_hu2"]), c_min
        if self.tau.ndim != 1:
            raise ValueError(f"{table}: was made by an older version, by label and edge distance; calibrate anew")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Judge one item."""
        label, variance = plain(data["label"])[0, 0].cpu(), plain(data["variance"])[0, 0].cpu()
        values = confidence(variance, label, self.tau, c_min=self.c_min)
        kept = MetaTensor(values[None], meta=data["pred"].meta)
        return {**data, "confidence": kept, "score": sample_score(variance, label)}


class CalibrateConfidence:
    """Collect variances of rendered held-out masks and write the confidence table.

    At most 50,000 voxels of each label are kept of a case, drawn from its file name.

    Args:
        path: JSON file to write.
        made_with: what the variance depends on: weights, spacing and so on; goes into the table.
        num_labels: label ids 0 to num_labels - 1.
        quantile: variance at which confidence is one half.
    """

    def __init__(self, path: str, *, made_with: Mapping[str, Any], num_labels: int, quantile: float = 0.9) -> None:
        self.path, self.made_with = Path(path), plain_values(made_with)
        self.num_labels, self.quantile = num_labels, quantile
        self._cases: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._names: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose predictions are (B, 2, H, W, D)."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep variance and label of some voxels of each case."""
        variances, labels = engine.state.output[Keys.PRED][:, 1].cpu(), engine.state.batch["label"]  # type: ignore[index]
        for variance, volume in zip(variances, labels, strict=True):
            label = plain(volume)[0, 0].cpu().round().long()
            name = Path(file_of(volume)).name
            generator = torch.Generator().manual_seed(int(content_hash(name.encode())[:8], 16))
            ids, kept = label.flatten(), []
            for index in ids.unique().tolist():
                voxels = (ids == index).nonzero()[:, 0]
                kept.append(voxels[torch.randperm(len(voxels), generator=generator)[:_VOXELS_OF_A_LABEL]])
            chosen = torch.cat(kept)
            self._cases.append((variance.flatten()[chosen], ids[chosen]))
            self._names.append(name)

    def write(self, engine: Engine) -> None:
        """Write the table."""
        tau, count = tau_table(self._cases, num_labels=self.num_labels, quantile=self.quantile)
        content = {"tau_hu2": tau.tolist(), "voxels": count.tolist(), "quantile": self.quantile, "masks": self._names}
        write_json(self.path, {**content, **self.made_with})
        logger.info("confidence table of %d cases: %s", len(self._cases), self.path)


class ConfidenceSchedule:
    """Raise the exponent of the confidence in a :class:`custom.losses.CALLoss` from 0 to 1, by epochs.

    During the first epochs confidence says nothing yet about what the segmenter finds hard; it first learns from all.

    Args:
        loss: whose `gamma` is set.
        warmup_epochs: so many epochs with gamma 0.
        ramp_epochs: so many more until gamma is 1, in equal steps.

    Raises:
        ValueError: for a negative number of epochs.
    """

    def __init__(self, loss: CALLoss, *, warmup_epochs: int, ramp_epochs: int) -> None:
        if warmup_epochs < 0 or ramp_epochs < 0:
            raise ValueError(f"warmup_epochs, ramp_epochs: must not be negative, got {warmup_epochs}, {ramp_epochs}")
        self.loss, self.warmup_epochs, self.ramp_epochs = loss, warmup_epochs, ramp_epochs

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set gamma; epochs count from 1."""
        done = engine.state.epoch - self.warmup_epochs
        self.loss.gamma = min(max(done / (self.ramp_epochs + 1), 0.0), 1.0)
