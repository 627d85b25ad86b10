"""Layer 2: how a batch becomes a problem of training or rendering for MONAI's stock engines."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines.utils import PrepareBatch
from monai.networks.schedulers import Scheduler


def _move(batchdata: dict[str, Any], key: str, device: Any, non_blocking: bool) -> torch.Tensor:
    return batchdata[key].as_subclass(torch.Tensor).to(device=device, dtype=torch.float32, non_blocking=non_blocking)


class PrepareResidualDiffusion(PrepareBatch):
    """Batch -> (clean residual, loss targets) for MONAI's `SupervisedTrainer` with `DiffusionInferer`.

    Args:
        scheduler: training schedule.
        residual_scale_hu: HU of one unit of the diffused residual.
    """

    def __init__(self, scheduler: Scheduler, *, residual_scale_hu: float) -> None:
        self.scheduler, self.residual_scale_hu = scheduler, residual_scale_hu

    def residual(
        self, batchdata: dict[str, Any], device: Any, non_blocking: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled residual (B, 1, H, W, D) and context (B, 6, H, W, D) on the device."""
        image, prior, context = (_move(batchdata, key, device, non_blocking) for key in ("image", "prior", "context"))
        return (image - prior) / self.residual_scale_hu, context

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, torch.Tensor]]:
        """Draw noise and times from the global generator of the device."""
        residual, context = self.residual(batchdata, device, non_blocking)
        noise = torch.randn_like(residual)
        timesteps = torch.randint(0, self.scheduler.num_train_timesteps, (len(residual),), device=residual.device)
        targets = {
            "velocity": self.scheduler.get_velocity(residual, noise, timesteps),
            "residual": residual,
            "timesteps": timesteps,
            "label": _move(batchdata, "label", device, non_blocking),
            "context": context,
            "image": _move(batchdata, "image", device, non_blocking),
        }
        return residual, targets, (), {"noise": noise, "timesteps": timesteps, "condition": context}


class PrepareRendering(PrepareBatch):
    """Batch -> (context, truth) for MONAI's `SupervisedEvaluator` with `StructDiffInferer`.

    The truth is (B, 2, H, W, D), image in HU and target label; in pure inference it is the label map as it came.
    """

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, Any]]:
        """Pass case names on, so that every case keeps its own noise."""
        context = _move(batchdata, "context", device, non_blocking)
        truth = batchdata["label"]
        if "image" in batchdata:
            truth = torch.cat([_move(batchdata, key, device, non_blocking) for key in ("image", "label")], 1)
        return context, truth, (), {"cases": list(batchdata["case"])}


class PrepareConfidence(PrepareBatch):
    """Batch -> (image, targets of :class:`custom.losses.CALLoss`) for MONAI's `SupervisedTrainer`."""

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, Any]]:
        """Image (B, 1, H, W, D) and `label`, `confidence` (B, 1, H, W, D), `sample_weight` (B,)."""
        keys = ("label", "confidence")
        targets = {key: _move(batchdata, key, device, non_blocking) for key in keys}
        targets["sample_weight"] = torch.as_tensor(batchdata["sample_weight"], dtype=torch.float32, device=device)
        return _move(batchdata, "image", device, non_blocking), targets, (), {}
