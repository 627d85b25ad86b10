"""Runs that go on after an interruption as if there had been none."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from custom.runs.files import file_hash, plain_values
from custom.runs.folders import changes, config_beyond, run_options
from custom.runs.weights import last_line, save_atomically
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader

logger = logging.getLogger(__name__)
_RUN = "run"
"""Key of the options in a checkpoint; older versions had a few of them under "options"."""


_MOST = 5  # ours: changes that a message of one line has room for


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
        resolved, leave_out: of :func:`custom.runs.folders.run_options`: what a run must repeat to be continued. Other
            values would be ignored, since what they set is part of the state, or lead to another result.
        options: more of it, by name.
        data: name -> cases, each a dictionary, whose files must hold what they held. Hashes of the content are compared
            and no paths or times, so data may be moved and copied; reading the files once more costs little beside
            unpacking and resampling them, which a training does anyway. Cases without an entry `case` are those of
            MONAI Label, where labels are added while a training is interrupted, and are not compared.
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
        resolved: Mapping[str, Any] | None = None,
        leave_out: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        data: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        forget_when_done: bool = False,
    ) -> None:
        self.objects, self.path, self.forget_when_done = objects, Path(path), forget_when_done
        self.resolved, self.leave_out, self.more, self.data = resolved or {}, leave_out, dict(options or {}), data or {}
        self.places = {"cpu": str(device), "cuda:0": str(device)}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, before handlers that look at whether it was resumed."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load the checkpoint, if any, and begin to save."""
        state = {**self.objects, "trainer": engine}
        options = run_options(self.resolved, self.leave_out)
        self.options = {
            **options,
            **plain_values(self.more),
            **config_beyond(options, self.leave_out),
            "data": {name: _content(cases) for name, cases in self.data.items()},
            "processes": idist.get_world_size(),
        }
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
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            before = saved[_RUN] if _RUN in saved else self._of_older_version(saved)
            changed = changes(before, self.options)
            if not changed:
                CheckpointLoader(load_path=str(self.path), load_dict=state, map_location=self.places)(engine)
        except Exception as error:  # what is no file of torch makes it raise errors of any kind
            raise ValueError(
                f"{self.path}: this interrupted run cannot be continued ({last_line(error)}); {remedy}"
            ) from error
        if changed:
            words = [f"{name} {was}, now {now}" for name, (was, now) in list(changed.items())[:_MOST]]
            words += [f"{len(changed) - _MOST} more"] if len(changed) > _MOST else []
            raise ValueError(f"{self.path}: is of an interrupted run with {', '.join(words)}; {remedy}")

    def _of_older_version(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a run that recorded few of them: the others are taken to be the same."""
        known = dict(saved.get("options", {}))
        others = sorted({*self.options} - {*known})
        logger.warning("%s: was written by an older version; not compared are %s", self.path, ", ".join(others))
        return {**self.options, **known}

    def save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Write the checkpoint."""
        content = {name: part.state_dict() for name, part in state.items()}
        save_atomically({**content, _RUN: self.options}, self.path)


_FILES = ("image", "label", "confidence")


def _content(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Number and name of each case -> its numbers, and hashes of its files; of cases that have a name."""
    return {
        f"{number} {case['case']}": {
            key: file_hash(value) if key in _FILES else value
            for key, value in case.items()
            if key in _FILES or isinstance(value, (bool, int, float))
        }
        for number, case in enumerate(cases)
        if "case" in case
    }
