"""Weights: loaded, averaged, and written when they are worth it."""

from __future__ import annotations

import errno
import logging
import math
import os
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from custom.runs.files import replace_file
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys

logger = logging.getLogger(__name__)


def existing_handler(handler: Any) -> Any:
    """Return a handler that the config declares elsewhere, because other parts refer to it.

    MONAI asks for handler lists of plain dictionaries; this is the dictionary around a reference.
    """
    return handler


def last_line(error: Exception) -> str:
    """The most telling line of an error of torch."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def save_atomically(content: Any, path: Path, *, option: str = "output_dir") -> None:
    """`torch.save` to a hidden neighbour, then move it in place; an error leaves no part of it.

    Args:
        content: to save.
        path: of the file.
        option: that names another place, for the message.

    Raises:
        OSError: naming the file, when the disk is full or the folder cannot be written, and the remedy.
    """

    def write(part: Path) -> None:
        try:
            with part.open("wb") as file:  # given a name, torch would write it into the file
                torch.save(content, file)
        except RuntimeError as error:  # what torch calls a full disk
            raise OSError(errno.EIO, "torch could not write all of it, the disk may be full") from error

    replace_file(path, write, option=option)


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
        option: that defines the network, for the message.

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: when it holds the weights of another network, or such that are not finite.
    """

    def __init__(self, model: torch.nn.Module, path: str, *, option: str = "network_def") -> None:
        self.model, self.path, self.option = model, path, option

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        """Load."""
        if not os.path.isfile(self.path):
            raise FileNotFoundError(
                f"{self.path}: no weights; train first, or point `ckpt_dir` to a folder with {Path(self.path).name}"
            )
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError("it holds no weights by name")
        except Exception as error:  # what is no file of torch makes it raise errors of any kind
            raise self._unfit(error) from error
        try:
            self.model.load_state_dict(state)
        except ValueError as error:  # of a network that knows what these are
            raise ValueError(f"{self.path}: {error}") from error
        except Exception as error:  # names that are no text, values that are no tensors
            raise self._unfit(error) from error
        if not is_finite(self.model):
            raise ValueError(
                f"{self.path}: these weights are NaN or infinite, they are of a training that diverged; train anew, or "
                "use others"
            )

    def _unfit(self, error: Exception) -> ValueError:
        """What is said of a file that no network can be filled with."""
        return ValueError(
            f"{self.path}: these are not weights of the configured network ({last_line(error)}); "
            f"use the `{self.option}` (preset) they were trained with"
        )


def is_finite(model: torch.nn.Module) -> bool:
    """Whether all weights and buffers are numbers."""
    return all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


class RefuseDivergence:
    """End a training with an error as soon as its loss, or a weight at the end of an epoch, is not finite.

    Attach before handlers that write weights: those of earlier epochs stay.

    Args:
        network: the bare network.
        learning_rate: of the training, which the message names.
        output_dir: of the training, where its state of earlier epochs lies.

    Raises:
        ValueError: naming epoch and iteration, and the option to change.
    """

    def __init__(self, network: torch.nn.Module, *, learning_rate: float, output_dir: str) -> None:
        self.network, self.learning_rate, self.output_dir = network, learning_rate, output_dir

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check_weights)

    def check_loss(self, engine: Engine) -> None:
        """Look at one loss."""
        loss = float(engine.state.output[Keys.LOSS].detach())  # type: ignore[index]
        if not math.isfinite(loss):
            self._refuse(engine, f"the loss is {loss}")

    def check_weights(self, engine: Engine) -> None:
        """Look at all weights: a last step may have spoilt them after a loss that was finite."""
        if not is_finite(self.network):
            self._refuse(engine, "weights are NaN or infinite")

    def _refuse(self, engine: Engine, what: str) -> None:
        when = f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"
        raise ValueError(
            f"learning_rate {self.learning_rate}: the training diverged, {what} in {when}; lower it, and set another "
            f"output_dir or delete {Path(self.output_dir) / 'resume.pt'}; weights that were written earlier stay"
        )


class ClipGradients:
    """Limit the norm of all gradients together before each step, so that one wild batch cannot undo an epoch.

    Args:
        network: whose gradients are clipped.
        max_norm: largest norm; larger ones are scaled down to it.
    """

    def __init__(self, network: torch.nn.Module, *, max_norm: float) -> None:
        self.network, self.max_norm = network, max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip."""
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


def _on_cpu(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that a machine without the device of their training can load as they are."""
    return {name: value.cpu() for name, value in model.state_dict().items()}


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
        save_atomically(_on_cpu(self.model), self.path, option="ckpt_dir")
        logger.info("new best %s %.4f: %s", engine.state.key_metric_name, score, self.path)  # type: ignore[attr-defined]


class KeepLast:
    """Write the weights at the end of a training without a best, atomically; one that fails writes nothing.

    MONAI's `CheckpointSaver` with `save_final` would also write those of a training that failed.

    Args:
        model: whose state dict is written.
        path: file to write.
        keep_best: what has written the weights already, unless no validation gave a score.
    """

    def __init__(self, model: torch.nn.Module, path: str, *, keep_best: KeepBest | None = None) -> None:
        self.model, self.path, self.keep_best = model, Path(path), keep_best

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the weights."""
        if idist.get_rank() != 0 or (self.keep_best is not None and self.keep_best.best > -float("inf")):
            return
        save_atomically(_on_cpu(self.model), self.path, option="ckpt_dir")
        logger.info("no validation gave a score: the last weights are kept: %s", self.path)
