"""Confidence handed to the loss."""

from __future__ import annotations

from typing import Any

import torch
from custom.volumes.grids import on_device
from monai.engines.utils import PrepareBatch


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
