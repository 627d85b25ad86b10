"""Runs that go on after an interruption as if there had been none."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader

from custom.runs.weights import UNREADABLE, last_line, save_atomically

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
