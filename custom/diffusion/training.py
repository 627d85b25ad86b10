"""How a batch becomes a problem of training or rendering, and what is measured of the diffusion while training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from custom.diffusion.coarse import CoarseUNet
from custom.diffusion.context import RESIDUAL_UNIT_HU
from custom.diffusion.formulas import amplitudes
from custom.diffusion.loss import StructDiffLoss, label_edges
from custom.diffusion.network import Prediction, StructDiffUNet
from custom.diffusion.noise import case_noise
from custom.volumes.grids import crop_to, on_device, pad_to_multiple
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents, PrepareBatch

logger = logging.getLogger(__name__)


def scaled_residual(
    batch: dict[str, Any], device: Any, non_blocking: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled residual (B, 1, H, W, D) and context (B, 4, H, W, D) of a batch, on the device."""
    image, prior, context = (on_device(batch, key, device, non_blocking) for key in ("image", "prior", "context"))
    return (image - prior) / RESIDUAL_UNIT_HU, context


class PrepareResidualDiffusion(PrepareBatch):
    """Batch -> (noise, targets of `StructDiffLoss`) for MONAI's `SupervisedTrainer` with `SimpleInferer`.

    Args:
        network: the bare network, whose schedule is that of the noise.
    """

    def __init__(self, network: StructDiffUNet) -> None:
        self.network = network

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, Any]]:
        """Draw noise and times from the global generator of the device."""
        residual, context = scaled_residual(batchdata, device, non_blocking)
        noise = torch.randn_like(residual)
        timesteps = torch.randint(0, len(self.network.alphas_cumprod), (len(residual),), device=residual.device)
        targets = {"label": on_device(batchdata, "label", device, non_blocking)}
        return noise, targets, (timesteps, context), {"residual": residual}


class PrepareVelocity(PrepareBatch):
    """Batch -> (noisy image, velocity) of a diffusion of `image` itself, told `context`, for MONAI's engines.

    Args:
        network: the bare network, whose schedule is that of the noise.
        by_case: draw noise and time from the names of the cases, for evaluations that can be compared.
    """

    def __init__(self, network: CoarseUNet, *, by_case: bool = False) -> None:
        self.network, self.by_case = network, by_case

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, Any]]:
        """Draw noise and times, from the global generator of the device else."""
        image, context = (on_device(batchdata, key, device, non_blocking) for key in ("image", "context"))
        noise, steps = torch.randn_like(image), len(self.network.alphas_cumprod)
        timesteps = torch.randint(0, steps, (len(image),), device=image.device)
        if self.by_case:
            noise = torch.stack([case_noise(image.shape[1:], 0, case) for case in batchdata["case"]]).to(image)
            chances = torch.cat([case_noise((1,), 0, f"time of {case}") for case in batchdata["case"]])
            timesteps = (torch.special.ndtr(chances) * steps).long().clamp(max=steps - 1).to(image.device)
        a, s = amplitudes(self.network.alphas_cumprod, timesteps, image.ndim)
        return a * image + s * noise, a * noise - s * image, (timesteps, context), {}


class PrepareRendering(PrepareBatch):
    """Batch -> (context, truth) for MONAI's `SupervisedEvaluator` with `StructDiffInferer`.

    The truth is (B, 2, H, W, D), `scan` in HU and target label; in pure inference it is the label map as it came.
    """

    def __call__(
        self, batchdata: dict[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, Any]]:
        """Pass case names on, so that every case keeps its own noise."""
        context = on_device(batchdata, "context", device, non_blocking)
        truth = batchdata["label"]
        if "scan" in batchdata:
            truth = torch.cat([on_device(batchdata, key, device, non_blocking) for key in ("scan", "label")], 1)
        return context, truth, (), {"cases": list(batchdata["case"])}


class MomentsFirst:
    """Train the moments alone in the first epochs: the remainder, which the diffusion learns, is made by them.

    Args:
        network: the bare network.
        epochs: so many; where a run has no more, a warning says that its U-Net stays untrained.
    """

    def __init__(self, network: StructDiffUNet, *, epochs: int) -> None:
        self.network, self.epochs = network, epochs

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self.warn)
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def warn(self, engine: Engine) -> None:
        """Look at the length of the run."""
        if self.epochs >= engine.state.max_epochs:  # type: ignore[operator]
            logger.warning(
                "moments_epochs %d of max_epochs %d: the U-Net is not trained; lower it, or render with "
                "`sample_strength` 0, the mean",
                self.epochs,
                engine.state.max_epochs,
            )

    def __call__(self, engine: Engine) -> None:
        """Switch."""
        self.network.moments_only = engine.state.epoch <= self.epochs


class HeldOutLoss:
    """Minus the training loss on held-out cases, a metric of an evaluation, and what the U-Net explains there.

    Adds "remaining_edge_<t>" and "remaining_elsewhere_<t>" for each time: the squared velocity error over that without
    the U-Net (F = 0), where labels meet and elsewhere; 1 is a U-Net that knows nothing, NaN that no place is such.
    Noise is drawn from the names of the cases.

    Args:
        network: in evaluation mode, when the evaluator runs.
        loss: of the training.
        device: where to run it.
        timesteps: of the schedule.
    """

    def __init__(
        self,
        network: StructDiffUNet,
        *,
        loss: StructDiffLoss,
        device: Any = None,
        timesteps: Sequence[int] = (200, 400, 600, 800),
    ) -> None:
        self.network, self.loss, self.device, self.timesteps = network, loss, device, list(timesteps)
        self._sums: dict[str, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []

    def attach(self, engine: Engine, name: str) -> None:
        """Attach to an evaluator whose batches hold `image` (structure), `prior`, `context`, `label` and `case`."""
        self.name = name
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def reset(self, engine: Engine) -> None:
        """Forget earlier epochs."""
        self._sums, self._losses = {}, []

    @torch.no_grad()
    def collect(self, engine: Engine) -> None:
        """Add one batch."""
        batch = engine.state.batch
        residual, context = scaled_residual(batch, self.device)  # type: ignore[arg-type]
        label = on_device(batch, "label", self.device)  # type: ignore[arg-type]
        edge = label_edges(pad_to_multiple(label, 2))
        noise = torch.stack([case_noise(residual.shape[1:], 0, case) for case in batch["case"]])  # type: ignore[index]
        for t in self.timesteps:
            times = torch.full((len(residual),), t, dtype=torch.int64, device=residual.device)
            prediction = self.network(noise.to(residual), times, context, residual)
            self._losses.append(self.loss(prediction, {"label": label}).double())
            self._add(t, prediction, edge)

    def _add(self, t: int, prediction: Prediction, edge: torch.Tensor) -> None:
        parts = (prediction.velocity, prediction.wanted)
        velocity, wanted = (crop_to(part, edge.shape[2:]) for part in parts if part is not None)
        for name, where in (("edge", edge), ("elsewhere", ~edge)):
            squares = [(part.square() * where).sum(dtype=torch.float64) for part in (velocity - wanted, wanted)]
            key = f"remaining_{name}_{t}"
            self._sums[key] = self._sums.get(key, 0) + torch.stack(squares)

    def write(self, engine: Engine) -> None:
        """Add the metrics."""
        losses = torch.stack([torch.stack(self._losses).sum(), torch.full_like(self._losses[0], len(self._losses))])
        total, count = torch.as_tensor(idist.all_reduce(losses)).tolist()
        engine.state.metrics[self.name] = -total / count
        for key, sums in self._sums.items():
            with_network, without = torch.as_tensor(idist.all_reduce(sums)).tolist()
            engine.state.metrics[key] = with_network / without if without else float("nan")
