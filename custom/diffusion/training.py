"""How a batch becomes a problem of training or rendering, and what is measured before and while training."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import PrepareBatch
from monai.networks.schedulers import Scheduler

from custom.diffusion.moments import MIN_SIGMA, SD_OVER_MEAN_ABSOLUTE, ResidualMoments, label_edges, to_local
from custom.diffusion.network import StructDiffUNet
from custom.volumes.grids import on_device, pad_to_multiple
from custom.volumes.haar import haar_pack


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
        image, prior, context = (
            on_device(batchdata, key, device, non_blocking) for key in ("image", "prior", "context")
        )
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
            "label": on_device(batchdata, "label", device, non_blocking),
            "context": context,
            "image": on_device(batchdata, "image", device, non_blocking),
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
        context = on_device(batchdata, "context", device, non_blocking)
        truth = batchdata["label"]
        if "image" in batchdata:
            truth = torch.cat([on_device(batchdata, key, device, non_blocking) for key in ("image", "label")], 1)
        return context, truth, (), {"cases": list(batchdata["case"])}


logger = logging.getLogger(__name__)


def residual_sigma(
    batches: Iterable[dict[str, Any]], prepare: PrepareResidualDiffusion, moments: ResidualMoments, device: torch.device
) -> torch.Tensor:
    """Deviation of the packed residual in its local basis and unit, by its mean absolute value (robust).

    Args:
        batches: training batches.
        prepare: how a batch becomes a residual.
        moments: gives the shape of the table.
        device: where to measure.

    Returns:
        (modes, regions, 8) float32, at least MIN_SIGMA; cells that no voxel fell into keep 1.
    """
    sums, count = torch.zeros(2, *moments.table.shape, dtype=torch.float64, device=device)
    for batch in batches:
        residual, context = (pad_to_multiple(part, 2) for part in prepare.residual(batch, device))
        cell, unit = moments.cells(context)
        local = to_local(haar_pack(residual), label_edges(context[:, :1]))
        more = moments.absolute_sums(local / unit, cell)
        sums, count = sums + more[0], count + more[1]
    sums, count = (torch.as_tensor(idist.all_reduce(part)) for part in (sums, count))
    measured = (SD_OVER_MEAN_ABSOLUTE * sums / count).clamp(min=MIN_SIGMA)
    return torch.where(count > 0, measured, torch.ones_like(measured)).float()


class MeasureResidual:
    """Measure the residual's standard deviations before the first epoch; a resumed run keeps those it loaded.

    Attach after :class:`Resume`.

    Args:
        network: the bare network to set.
        shadow: its EMA copy, set as well.
        data_loader: training batches.
        prepare: how a batch becomes a residual.
        batches: how many batches to measure.
        device: where to measure.
    """

    def __init__(
        self,
        network: StructDiffUNet,
        shadow: StructDiffUNet,
        data_loader: Iterable[dict[str, Any]],
        prepare: PrepareResidualDiffusion,
        *,
        batches: int,
        device: torch.device,
    ) -> None:
        self.network, self.shadow, self.data_loader, self.prepare = network, shadow, data_loader, prepare
        self.batches, self.device = batches, torch.device(device)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def _some(self) -> Iterable[dict[str, Any]]:
        remaining = self.batches
        while remaining > 0:
            for batch in self.data_loader:
                yield batch
                remaining -= 1
                if remaining == 0:
                    return

    def __call__(self, engine: Engine) -> None:
        """Measure unless training was resumed."""
        if engine.state.epoch > 0:
            return
        sigma = residual_sigma(self._some(), self.prepare, self.network.moments, self.device)
        for network in (self.network, self.shadow):
            network.moments.set_table(sigma)
        logger.info("residual sigma (mode, region, low-pass and highest band): %s", sigma[..., [0, 7]].tolist())
