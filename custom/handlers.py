"""Layer 2: ignite handlers that MONAI does not have."""

from __future__ import annotations

import logging
import os
import pickle
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.handlers import CheckpointLoader

from custom.diffusion import haar_pack, pad_to_multiple
from custom.engines import PrepareResidualDiffusion
from custom.networks import StructDiffUNet
from custom.records import replace_file
from custom.residual import GAUSSIAN, MIN_SIGMA, ResidualMoments, label_edges, to_local

logger = logging.getLogger(__name__)


class SeedEachEpoch:
    """Derive all randomness of an epoch from (seed, epoch, rank), so that a resumed run repeats an uninterrupted one.

    Args:
        seed: base seed.
        transforms: random transforms (Compose) to reseed; each epoch of the engine it is attached to.
        vary: False repeats the same draws in every epoch (validation).
        global_random: also seed the generators of torch, numpy and random.
    """

    def __init__(self, seed: int, transforms: Any, *, vary: bool = True, global_random: bool = True) -> None:
        self.seed, self.transforms, self.vary, self.global_random = seed, transforms, vary, global_random

    def attach(self, engine: Engine) -> None:
        """Attach to an engine."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Reseed."""
        parts = (self.seed, engine.state.epoch if self.vary else 0, idist.get_rank())
        seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
        self.transforms.set_random_state(seed=seed)
        if self.global_random:
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)


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
    measured = (GAUSSIAN * sums / count).clamp(min=MIN_SIGMA)
    return torch.where(count > 0, measured, torch.ones_like(measured)).float()


def declared(handler: Any) -> Any:
    """Return a handler that the config declares elsewhere, because other parts refer to it.

    MONAI asks for handler lists of plain dictionaries; this is the dictionary around a reference.
    """
    return handler


UNREADABLE = (RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)  # by torch, or another network


def last_line(error: Exception) -> str:
    """The most telling line of an error of torch."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def save_atomically(content: Any, path: Path) -> None:
    """`torch.save` to a hidden neighbour, then move it in place; an error leaves no part of it."""
    replace_file(path, lambda part: torch.save(content, part))


class Resume:
    """Save the whole state of a run after every epoch, and take it up again when the run is started anew.

    The engine it is attached to is part of the state, which a config cannot name from inside the engine's own handlers.
    Saving comes after all other handlers of the epoch. Random state is not saved: see :class:`SeedEachEpoch`.

    Args:
        objects: name -> object with `state_dict` and `load_state_dict`.
        path: of the one checkpoint file.
        device: where to load to.
        options: numbers and texts that a run must repeat to be continued: others would be ignored, since what they
            set is part of the state.
        forget_when_done: remove the file at the end of a run, so that the next one is another training; else a finished
            run stays finished.

    Raises:
        ValueError: when the file is of a run with other options or another network, or damaged.
    """

    def __init__(
        self,
        objects: dict[str, Any],
        path: str,
        device: torch.device,
        *,
        options: Mapping[str, Any] | None = None,
        forget_when_done: bool = False,
    ) -> None:
        self.objects, self.path, self.forget_when_done = objects, Path(path), forget_when_done
        self.options, self.places = dict(options or {}), {"cpu": str(device), "cuda:0": str(device)}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, before handlers that look at whether it was resumed."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load the checkpoint, if any, and begin to save."""
        state = {**self.objects, "trainer": engine}
        if self.path.exists():
            self._load(engine, state)
            logger.info("resumed from %s at epoch %d", self.path, engine.state.epoch)
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save, state)
            if self.forget_when_done:
                engine.add_event_handler(Events.COMPLETED, lambda: self.path.unlink(missing_ok=True))

    def _load(self, engine: Engine, state: dict[str, Any]) -> None:
        remedy = "repeat that run's options to go on with it; to start anew delete the file or set another output_dir"
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True).get("options", {})
            changed = {
                key: (saved[key], value) for key, value in self.options.items() if saved.get(key, value) != value
            }
            if not changed:
                CheckpointLoader(load_path=str(self.path), load_dict=state, map_location=self.places)(engine)
        except (*UNREADABLE, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path}: this interrupted run cannot be continued ({last_line(error)}); {remedy}"
            ) from error
        if changed:
            words = ", ".join(f"{key} {before}, now {now}" for key, (before, now) in changed.items())
            raise ValueError(f"{self.path}: is of an interrupted run with {words}; {remedy}")

    def save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Write the checkpoint."""
        content = {name: part.state_dict() for name, part in state.items()}
        save_atomically({**content, "options": self.options}, self.path)


class WeightAverage(EMAHandler):
    """ignite's moving average of the weights, over a window that grows with the iterations.

    The momentum max(momentum, 10 / (10 + iteration)) is a function of the engine's iteration alone, so a resumed run
    repeats it; ignite's own warm-up counts anew. About the last tenth of the run is averaged, as in Karras et al. 2024.
    """

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        setattr(engine.state, name, max(self.momentum, 10 / (10 + engine.state.iteration)))
        super()._update_ema_model(engine, name)


def load_pretrained(model: torch.nn.Module, path: str) -> bool:
    """Load weights to start a training from, where there are any.

    Not a handler: a checkpoint that the trainer's handlers load, to resume or in MONAI Label, comes later and wins.

    Args:
        model: the network to fill.
        path: of the weights; a missing file is said in the log.

    Returns:
        whether there were any.

    Raises:
        ValueError: when they are of another network.
    """
    if not os.path.isfile(path):
        logger.info("%s: no pre-trained weights here", path)
        return False
    LoadWeights(model, path)()
    logger.info("training starts from %s", path)
    return True


class LoadWeights:
    """Load trained weights before a run.

    Args:
        model: the network to fill.
        path: its `model.pt`.

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: when it holds the weights of another network.
    """

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        self.model, self.path = model, path

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        """Load."""
        if not os.path.isfile(self.path):
            raise FileNotFoundError(
                f"{self.path}: no weights; train first, or point `ckpt_dir` to a folder with model.pt"
            )
        try:
            self.model.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except UNREADABLE as error:
            raise ValueError(
                f"{self.path}: these are not weights of the configured network ({last_line(error)}); "
                "use the `network_def` (preset) they were trained with"
            ) from error


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


class KeepBest:
    """Write the weights of the best validation epoch, atomically, under one name. Its score is part of the run's state.

    Args:
        model: whose state dict is written.
        path: file to write.
    """

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        self.model, self.path, self.best = model, Path(path), -float("inf")

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def state_dict(self) -> dict[str, float]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up the best score of a resumed run."""
        self.best = state["best"]

    def __call__(self, engine: Engine) -> None:
        """Write the weights when the engine's key metric is a new best."""
        score = float(engine.state.metrics[engine.state.key_metric_name])  # type: ignore[attr-defined]
        if not score > self.best or idist.get_rank() != 0:
            return
        self.best = score
        save_atomically(self.model.state_dict(), self.path)
        logger.info("new best %s %.4f: %s", engine.state.key_metric_name, score, self.path)  # type: ignore[attr-defined]


class KeepLast:
    """Write the weights at the end of a training, atomically; one that fails or is interrupted writes nothing.

    MONAI's `CheckpointSaver` with `save_final` would also write those of a training that failed.

    Args:
        model: whose state dict is written.
        path: file to write.
    """

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        self.model, self.path = model, Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the weights."""
        if idist.get_rank() == 0:
            save_atomically(self.model.state_dict(), self.path)
