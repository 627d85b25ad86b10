"""Folders that hold the results of one run: whose they are, and who is at work in them."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from custom.runs.files import (
    content_hash,
    differences,
    file_hashes,
    plain_values,
    read_json,
    remove_leftovers,
    write_json,
)
from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)
_LOCKS: dict[str, TextIO] = {}


def claim_folder(
    output_dir: str, *, name: str, provenance: Mapping[str, Any], intermediate: Sequence[str] | None = None
) -> dict[str, Any]:
    """Makes a folder the place of one run: writes what the run is, or checks that it is the same one going on.

    A run that ended before it made anything can leave the folder to the next one, whatever its options: else the remedy
    that an error names could not be followed.

    Args:
        output_dir: a new or empty folder, or one that the same run began.
        name: of the JSON file in it that says what the run is.
        provenance: what determines the results; dataclasses are written as dictionaries.
        intermediate: names in the folder that are no results; another run takes over a folder that holds nothing else,
            and removes them. None: it never does.

    Returns:
        The provenance as written, with "config_hash" of all of it.

    Raises:
        ValueError: if the folder belongs to another run (naming what differs) or holds other files.
    """
    root = Path(output_dir)
    record, wanted = root / name, plain_values(provenance)
    wanted["config_hash"] = content_hash(json.dumps(wanted, sort_keys=True).encode())
    if record.exists():
        found = read_json(record, f"choose another output_dir, or delete {root} if nothing in it is needed")
        differing = differences({**found, "config_hash": None}, {**wanted, "config_hash": None})
        if not differing:
            return found
        made = [path for path in _visible(root) if path.name not in (name, *(intermediate or ()))]
        if intermediate is None or made or _is_at_work(root):
            raise ValueError(
                f"{record} belongs to another run ({_said(differing)}); repeat its options to go on, choose another "
                f"output_dir, or delete {root} if nothing in it is needed"
            )
        for part in (root / name for name in intermediate):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        write_json(record, wanted)
        logger.info("%s: of a run that made nothing, with %s; replaced", record, _said(differing))
        return wanted
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir {root} is a file; choose a folder")
    other = _visible(root)
    if record.exists():  # another process of this run was faster
        return claim_folder(output_dir, name=name, provenance=provenance, intermediate=intermediate)
    if other:
        raise ValueError(
            f"output_dir {root} holds other files ({other[0].name}, ...) and no {name}; choose a new or empty folder"
        )
    write_json(record, wanted)
    return wanted


def _visible(root: Path) -> list[Path]:
    """What a folder holds, hidden files and folders apart; nothing when there is none."""
    return sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.exists() else []


_LONGEST, _MOST = 60, 5  # ours: characters of a value, and changes, that a message of one line has room for


def _said(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes by the names that options have, each with its two values, shortened."""
    parts = []
    for option, values in list(changes.items())[:_MOST]:
        place, _, file = option.partition("#")
        before, now = (text if len(text := str(value)) <= _LONGEST else text[:_LONGEST] + "..." for value in values)
        parts.append(f"{f'{place}: {file}' if '/' in file else option}: {before} there, {now} now")
    return "; ".join(parts) + (f"; and {len(changes) - _MOST} more" if len(changes) > _MOST else "")


def _is_at_work(root: Path) -> bool:
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


class RemoveLeftovers:
    """Remove what killed processes left half-written in a folder, see :func:`remove_leftovers`, when an engine starts.

    Args:
        output_dir: the folder; those in it are looked into as well.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that writes there."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Remove."""
        remove_leftovers(self.output_dir, below=True)


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
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _lock(path, place, doing, other)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise OSError(error.errno, f"{reason}; choose another {other}", str(path.parent)) from error
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


NO_OPTIONS = ("files", "finalize", "imports", "initialize", "options", "run", "versions")
PLACES = (
    *("bundle_root", "ckpt_dir", "dataset_dir", "device", "num_workers", "output_dir", "shard", "shards"),
    *("tracking_uri", "use_cuda", "workers"),
)
"""Options that say where and by how many processes a run is made, not what comes out of it."""


def run_options(resolved: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Top-level options of a config: all values that JSON can hold, but for places and names to leave out.

    Args:
        resolved: id -> value of all that MONAI's `ConfigParser` has resolved so far; `$__local_refs` in a config. What
            a run is made of is resolved before the run begins.
        leave_out: further names: what only says where inputs lie, whose content is recorded instead.

    Returns:
        name -> value as JSON gives it back.
    """
    names = sorted(set(resolved) - {*NO_OPTIONS, *PLACES, *leave_out})
    top_level = [name for name in names if "::" not in name and not name.startswith("_")]
    return {name: plain_values(resolved[name]) for name in top_level if _is_plain(resolved[name])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, int, float))


class RunFolder:
    """The folder of one run: claimed when everything is checked and work begins, locked until it ends.

    As a context it gives the provenance: what the folder's record holds.

    Args:
        output_dir: a new or empty folder, or one that the same run began.
        record: name of the JSON file in it that says what the run is.
        resolved, leave_out: of :func:`run_options`.
        inputs: name -> dictionaries of files whose content determines the results.
        known: more of the provenance: program, version.
        shard: number of the part of the run that this process does.
        intermediate: of :func:`claim_folder`.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        record: str,
        resolved: Mapping[str, Any],
        leave_out: Sequence[str],
        inputs: Mapping[str, Sequence[Mapping[str, Any]]],
        known: Mapping[str, Any],
        shard: int = 0,
        intermediate: Sequence[str] | None = None,
    ) -> None:
        self.output_dir, self.record, self.resolved, self.leave_out = output_dir, record, resolved, leave_out
        self.inputs, self.known, self.shard, self.intermediate = inputs, known, shard, intermediate

    def __enter__(self) -> dict[str, Any]:
        """Claim and lock.

        Raises:
            ValueError, RuntimeError: as :func:`claim_folder` and :func:`lock_folder`.
        """
        options = run_options(self.resolved, [*self.leave_out, *self.inputs])
        inputs = {name: file_hashes(cases, ["image", "label", "file"]) for name, cases in self.inputs.items()}
        provenance = {**self.known, **inputs, **options}
        claimed = claim_folder(self.output_dir, name=self.record, provenance=provenance, intermediate=self.intermediate)
        lock_folder(self.output_dir, self.shard)
        remove_leftovers(Path(self.output_dir), below=True)
        return claimed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unlock_folder(self.output_dir, self.shard)
