"""Locks: who is at work in a folder, until that process ends in whatever way."""

from __future__ import annotations

import logging
import os
import platform
import sys
from pathlib import Path
from typing import TextIO

from custom.runs.files import named_folder, remove_leftovers
from ignite.engine import Engine

logger = logging.getLogger(__name__)
_LOCKS: dict[str, TextIO] = {}


def is_at_work(root: Path) -> bool:
    """Whether a process is at work on any part of the run."""
    for path in root.glob(".shard_*.lock"):
        shard, own = int(path.name.removeprefix(".shard_").removesuffix(".lock")), str(path.resolve()) in _LOCKS
        try:
            lock_folder(str(root), shard)
        except RuntimeError:
            return True
        if not own:
            unlock_folder(str(root), shard)
    return False


def lock_folder(output_dir: str, shard: int = 0) -> None:
    """Keeps other processes from doing the same part of a run in the same folder, until `unlock_folder` or the end.

    The operating system lets go of the lock when the process ends in whatever way, so nothing has to be cleaned up. A
    process that holds it already goes on. Where there are no POSIX locks (Windows, some network folders), a warning.

    Args:
        output_dir: of the run; exists.
        shard: number of the part.

    Raises:
        RuntimeError: if another process is at work there.
        OSError: naming the folder that cannot be written.
    """
    path = Path(output_dir).resolve() / f".shard_{shard}.lock"
    _lock(path, f"output_dir {output_dir}", f"at work on part {shard} of this run", "output_dir or shard")


def _lock(path: Path, place: str, doing: str, other: str) -> None:
    """Takes a lock file, or refuses: somebody is `doing` something at a `place`; `other` options would do."""
    if str(path) in _LOCKS:
        return
    if sys.platform == "win32":
        logger.warning("%s: locks need POSIX; start no second run into it", place)
        return
    import fcntl

    with named_folder(path.parent, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf: workers that are forked later do not inherit it
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise RuntimeError(
            f"{place}: {file.read().strip()} is {doing}; wait until it has ended or end it, or choose another {other}"
        ) from error
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s); start no second run into it", place, error)
    with named_folder(path.parent, other):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    _LOCKS[str(path)] = file


def unlock_folder(output_dir: str, shard: int = 0) -> None:
    """Lets other processes do the part of a run that `lock_folder` keeps; without a lock nothing happens."""
    _unlock(Path(output_dir).resolve() / f".shard_{shard}.lock")


def _unlock(path: Path) -> None:
    file = _LOCKS.pop(str(path), None)
    if file is not None:
        file.close()


class TrainingPlace:
    """Where one training at a time writes: its folder, and the file of its weights.

    Of several processes that train together the first takes it for all.

    Args:
        output_dir: of the training; made.
        weights: file that it writes; its folder is made.
    """

    def __init__(self, *, output_dir: str, weights: str) -> None:
        self.output_dir, self.weights = Path(output_dir), Path(weights)
        folder, file = self.output_dir.resolve(), self.weights.resolve()
        self._locks = {
            folder / ".training.lock": (f"output_dir {output_dir}", "training in this folder", "output_dir"),
            file.with_name(f".{file.name}.lock"): (weights, "training these weights", "ckpt_dir"),
        }

    def take(self) -> None:
        """Lock both until :meth:`run` is over or the process ends, and remove what killed processes left there.

        Raises:
            RuntimeError: naming the process that is training there.
            OSError: naming the folder that cannot be written.
        """
        if int(os.environ.get("RANK", 0)) != 0:
            return
        try:
            for path, (place, doing, other) in self._locks.items():
                _lock(path, place, doing, other)
        except BaseException:
            self._leave()
            raise
        remove_leftovers(self.output_dir, below=True)
        remove_leftovers(self.weights.parent)

    def run(self, trainer: Engine) -> None:
        """Train, and let others in when it is over in whatever way."""
        self.take()
        try:
            trainer.run()
        finally:
            self._leave()

    def _leave(self) -> None:
        for path in self._locks:
            _unlock(path)
