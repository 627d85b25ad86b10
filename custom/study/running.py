"""Stages run one after the other: said before, logged, skipped when done, gone on with after an interruption."""

from __future__ import annotations

import ctypes
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from custom.runs.files import content_hash, file_hash, make_folder, read_json, write_json
from custom.runs.locks import lock_folder, unlock_folder
from custom.runs.progress import duration
from custom.study.bundles import environment, typed
from custom.study.stages import Stage

logger = logging.getLogger(__name__)

DONE, LOGS = "done", "logs"
_SAY_S = 60.0
_POLL_S = 1.0
_LEAST_LEFT = 0.25  # of what it has taken, ours: where a stage takes longer than guessed
_TOLD_SHARE = 0.03  # ours: a rate from less than this is a guess
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class StageError(RuntimeError):
    """A stage has failed; the message is what it said last."""


def is_done(stage: Stage, root: Path, inputs: str) -> bool:
    """Whether this very command has ended well, of inputs of this hash, and what it made is there."""
    note = root / DONE / f"{stage.name}.json"
    if not note.is_file() or not stage.product.is_file():
        return False
    return read_json(note, "delete it, the stage is run again") == _note(stage, inputs)


def _note(stage: Stage, inputs: str) -> dict[str, object]:
    return {"command": list(stage.command), "inputs": inputs}


def unfinished(stages: Sequence[Stage], root: Path, inputs: str) -> list[Stage]:
    """Stages still to be run, and all that work on their results."""
    open_names: set[str] = set()
    for stage in stages:
        if not is_done(stage, root, inputs) or open_names & set(stage.needs):
            open_names.add(stage.name)
    return [stage for stage in stages if stage.name in open_names]


def say_plan(stages: Sequence[Stage], todo: Sequence[Stage]) -> None:
    """Log all stages with their commands and a guess of their time."""
    logger.info("%d stages, %d of them to do, about %s", len(stages), len(todo), duration(sum(s.seconds for s in todo)))
    for number, stage in enumerate(stages, start=1):
        state = f"about {duration(stage.seconds)}" if stage in todo else "done"
        logger.info("%2d %-20s %-18s %s", number, stage.name, state, stage.title)
        logger.info("   %s", typed(stage.command))


def run_stages(stages: Sequence[Stage], root: Path, *inputs: Path) -> None:
    """Run what is not done.

    Args:
        stages: in their order.
        root: folder of the study; gets `logs` and `done`.
        inputs: files that all is made of: where one has changed, nothing is done.

    Raises:
        FileNotFoundError: naming an input that is not there.
        StageError: naming the stage that failed, what it said last, its log and command.
        RuntimeError: when another process is at work there.
    """
    content = content_hash(*(file_hash(str(file)).encode() for file in inputs))
    make_folder(str(root))
    lock_folder(str(root))
    try:
        for folder in (LOGS, DONE):
            make_folder(str(root / folder))
        todo = unfinished(stages, root, content)
        say_plan(stages, todo)
        clock = _Clock(todo)
        for stage in todo:
            note = root / DONE / f"{stage.name}.json"
            note.unlink(missing_ok=True)
            _run(stage, root / LOGS / f"{stage.name}.log", clock)
            write_json(note, _note(stage, content))
        logger.info("all %d stages are done", len(stages))
    finally:
        unlock_folder(str(root))


class _Clock:
    """How long the rest will take: by guesses, corrected by what the stages before have taken."""

    def __init__(self, todo: Sequence[Stage]) -> None:
        self.todo = list(todo)
        self.guessed, self.taken = 0.0, 0.0

    def pace(self) -> float:
        """Time taken over time guessed, so far."""
        return self.taken / self.guessed if self.guessed else 1.0

    def said(self, stage: Stage, elapsed: float, first: float | None, share: float | None) -> str:
        """A line of progress."""
        later = sum(s.seconds for s in self.todo[self.todo.index(stage) + 1 :]) * self.pace()
        left = max(stage.seconds * self.pace() - elapsed, elapsed * _LEAST_LEFT)
        done = ""
        if share is not None:
            gained = share - (first or 0.0)
            left = elapsed * (1 - share) / gained if gained > _TOLD_SHARE else left
            done = f", {share:.0%} done"
        place = f"{self.todo.index(stage) + 1} of {len(self.todo)}"
        return f"{place} {stage.name}{done}, about {duration(left)} left; the whole about {duration(left + later)}"

    def add(self, stage: Stage, seconds: float) -> None:
        """Take down what a stage has taken."""
        self.guessed, self.taken = self.guessed + stage.seconds, self.taken + seconds


def _run(stage: Stage, log: Path, clock: _Clock) -> None:
    start, told, first = time.monotonic(), 0.0, stage.share(log)
    logger.info("%s: %s; log in %s", stage.name, stage.title, log)
    with log.open("a") as output:
        output.write(f"\n{typed(stage.command)}\n")
        output.flush()
        before = output.tell()
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:
                elapsed = time.monotonic() - start
                if elapsed - told >= _SAY_S:
                    told = elapsed
                    logger.info("%s", clock.said(stage, elapsed, first, stage.share(log)))
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    seconds = time.monotonic() - start
    if process.returncode:
        raise StageError(
            f"{stage.name}: stopped after {duration(seconds)}: {_cause(process.returncode, log, before)}; mend it and "
            f"run the study again, what is done is kept (all that it said: {log}; command: {typed(stage.command)})"
        )
    if not stage.product.is_file():
        raise StageError(f"{stage.name}: has ended without writing {stage.product}; its log is {log}")
    clock.add(stage, seconds)
    logger.info("%s: done in %s", stage.name, duration(seconds))


def _die_with_parent() -> None:
    """Let the kernel end a stage whose study is killed: it would go on alone, and keep its folder locked."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def _cause(code: int, log: Path, before: int) -> str:
    """Why a stage ended: the signal that ended it, else the cause it gave last, or its last line, in this run of it."""
    if code < 0:
        return f"{signal.Signals(-code).name} ended it, as it does where memory is short"
    with log.open(errors="replace") as said:
        said.seek(before)
        lines = [line.strip() for line in said if line.strip()]
    causes = [line for line in lines if line.startswith("ERROR: ")]
    return (causes or lines or ["it said nothing"])[-1].removeprefix("ERROR: ")
