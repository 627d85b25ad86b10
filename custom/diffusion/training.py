"""How a batch becomes a problem of training or rendering, and what is measured before and while training."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import ignite.distributed as idist
import torch
from custom.diffusion.context import RESIDUAL_UNIT_HU, Context
from custom.diffusion.formulas import amplitudes
from custom.diffusion.loss import centred_residual
from custom.diffusion.moments import MIN_SIGMA, SD_OVER_MEAN_ABSOLUTE, ResidualMoments, label_edges, to_local
from custom.diffusion.network import StructDiffUNet
from custom.volumes.grids import crop_to, on_device, pad_to_multiple
from custom.volumes.haar import haar_pack
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents, PrepareBatch
from monai.utils import CommonKeys as Keys

logger = logging.getLogger(__name__)


def scaled_residual(
    batch: dict[str, Any], device: Any, non_blocking: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled residual (B, 1, H, W, D) and context (B, 6, H, W, D) of a batch, on the device."""
    image, prior, context = (on_device(batch, key, device, non_blocking) for key in ("image", "prior", "context"))
    return (image - prior) / RESIDUAL_UNIT_HU, context


class PrepareResidualDiffusion(PrepareBatch):
    """Batch -> (noisy residual, targets of `StructDiffLoss`) for MONAI's `SupervisedTrainer` with `SimpleInferer`.

    Args:
        network: the bare network, whose schedule is that of the noise.
    """

    def __init__(self, network: StructDiffUNet) -> None:
        self.network = network

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, Any]]:
        """Draw noise and times from the global generator of the device; x = a x0 + s eps, v = a eps - s x0."""
        residual, context = scaled_residual(batchdata, device, non_blocking)
        noise = torch.randn_like(residual)
        alphas = self.network.alphas_cumprod.to(residual.device)
        timesteps = torch.randint(0, len(alphas), (len(residual),), device=residual.device)
        a, s = amplitudes(alphas, timesteps, residual.ndim)
        targets = {
            "velocity": a * noise - s * residual,
            "residual": residual,
            "label": on_device(batchdata, "label", device, non_blocking),
            "context": context,
            "image": on_device(batchdata, "image", device, non_blocking),
        }
        return a * residual + s * noise, targets, (timesteps, context), {"with_moments": True}


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


def residual_sigma(batches: Iterable[dict[str, Any]], moments: ResidualMoments, device: torch.device) -> torch.Tensor:
    """Deviation of the packed residual in its local basis and unit, by its mean absolute value (robust).

    Args:
        batches: training batches.
        moments: gives the shape of the table.
        device: where to measure.

    Returns:
        (modes, regions, 8) float32, at least MIN_SIGMA; cells that no voxel fell into keep 1.
    """
    sums, count = torch.zeros(2, *moments.table.shape, dtype=torch.float64, device=device)
    for batch in batches:
        residual, channels = (pad_to_multiple(part, 2) for part in scaled_residual(batch, device))
        context = Context.of(channels)
        cell, unit = moments.cells(context)
        local = to_local(haar_pack(residual), label_edges(context.target_label))
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
        batches: how many batches to measure.
        device: where to measure.
    """

    def __init__(
        self,
        network: StructDiffUNet,
        shadow: StructDiffUNet,
        data_loader: Iterable[dict[str, Any]],
        *,
        batches: int,
        device: torch.device,
    ) -> None:
        self.network, self.shadow, self.data_loader = network, shadow, data_loader
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
        sigma = residual_sigma(self._some(), self.network.moments, self.device)
        for network in (self.network, self.shadow):
            network.moments.set_table(sigma)
        logger.info("residual sigma (mode, region, low-pass and highest band): %s", sigma[..., [0, 7]].tolist())


class TrackResidual:
    """Let the measured deviations follow the mean, which explains ever more of the residual, after every iteration.

    Args:
        network: the bare network, whose table moves once it is measured.
    """

    def __init__(self, network: StructDiffUNet) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer of :class:`PrepareResidualDiffusion`."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Follow one batch."""
        if not bool(self.network.moments.measured):
            return
        prediction, target = (engine.state.output[key] for key in (Keys.PRED, Keys.LABEL))  # type: ignore[index]
        centred = centred_residual(prediction, target["residual"])
        sigma = crop_to(prediction.sigma, centred.shape[2:])
        self.network.moments.track(centred / sigma, Context.of(pad_to_multiple(target["context"], 2)))
