"""Confidence read beside image and label, and handed to the loss."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.engines.utils import PrepareBatch
from monai.transforms import Compose, EnsureChannelFirstd, Transform

from custom.volumes.grids import on_device
from custom.volumes.reading import LoadVolumesd, check_grid, file_of

logger = logging.getLogger(__name__)


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


class PrepareConfidence(PrepareBatch):
    """Batch -> (image, targets of :class:`custom.segmentation.loss.CALLoss`) for MONAI's `SupervisedTrainer`."""

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, Any]]:
        """Image (B, 1, H, W, D) and `label`, `confidence` (B, 1, H, W, D), `sample_weight` (B,)."""
        keys = ("label", "confidence")
        targets = {key: on_device(batchdata, key, device, non_blocking) for key in keys}
        targets["sample_weight"] = torch.as_tensor(batchdata["sample_weight"], dtype=torch.float32, device=device)
        return on_device(batchdata, "image", device, non_blocking), targets, (), {}
