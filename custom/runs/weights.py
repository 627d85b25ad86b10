"""Weights: loaded, averaged, and written when they are worth it."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler

from custom.runs.files import replace_file

logger = logging.getLogger(__name__)


def existing_handler(handler: Any) -> Any:
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
