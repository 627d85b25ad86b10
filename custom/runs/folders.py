"""Folders that hold the results of one run: whose they are, and who is at work in them."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from custom.runs.files import content_hash, file_hashes, plain_values, write_json

logger = logging.getLogger(__name__)
_LOCKS: dict[str, TextIO] = {}


def claim_folder(output_dir: str, *, name: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a folder the place of one run: writes what the run is, or checks that it is the same one going on.

    Args:
        output_dir: a new or empty folder, or one that the same run began.
        name: of the JSON file in it that says what the run is.
        provenance: what determines the results; dataclasses are written as dictionaries.

    Returns:
        The provenance as written, with "config_hash" of all of it.

    Raises:
        ValueError: if the folder belongs to another run (naming what differs) or holds other files.
    """
    root = Path(output_dir)
    record, wanted = root / name, plain_values(provenance)
    wanted["config_hash"] = content_hash(json.dumps(wanted, sort_keys=True).encode())
    if record.exists():
        found = json.loads(record.read_text())
        differing = sorted(k for k in {*found, *wanted} - {"config_hash"} if found.get(k) != wanted.get(k))
        if differing:
            changes = "; ".join(f"{k}: {found.get(k)} there, {wanted.get(k)} now" for k in differing)
            raise ValueError(
                f"{record} belongs to another run ({changes}); repeat its options to go on, choose another output_dir, "
                f"or delete {root} if nothing in it is needed"
            )
        return found
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir {root} is a file; choose a folder")
    other = [path for path in root.iterdir() if not path.name.startswith(".")] if root.exists() else []
    if record.exists():  # another process of this run was faster
        return claim_folder(output_dir, name=name, provenance=provenance)
    if other:
        raise ValueError(
            f"output_dir {root} holds other files ({other[0].name}, ...) and no {name}; choose a new or empty folder"
        )
    write_json(record, wanted)
    return wanted


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
    if str(path) in _LOCKS:
        return
    if sys.platform == "win32":
        logger.warning("%s: locks need POSIX; start no second run into this folder", output_dir)
        return
    import fcntl

    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf: workers that are forked later do not inherit it
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise RuntimeError(
            f"output_dir {output_dir}: {file.read().strip()} is at work on part {shard} of this run; wait until it has "
            "ended or end it, or choose another output_dir or shard"
        ) from error
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s); start no second run into it", output_dir, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _LOCKS[str(path)] = file


def unlock_folder(output_dir: str, shard: int = 0) -> None:
    """Lets other processes do the part of a run that `lock_folder` keeps; without a lock nothing happens."""
    file = _LOCKS.pop(str(Path(output_dir).resolve() / f".shard_{shard}.lock"), None)
    if file is not None:
        file.close()


NO_OPTIONS = ("finalize", "imports", "initialize", "run", "versions")
PLACES = ("bundle_root", "ckpt_dir", "dataset_dir", "device", "num_workers", "output_dir", "shard", "shards", "workers")
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
    ) -> None:
        self.output_dir, self.record, self.resolved, self.leave_out = output_dir, record, resolved, leave_out
        self.inputs, self.known, self.shard = inputs, known, shard

    def __enter__(self) -> dict[str, Any]:
        """Claim and lock.

        Raises:
            ValueError, RuntimeError: as :func:`claim_folder` and :func:`lock_folder`.
        """
        options = run_options(self.resolved, [*self.leave_out, *self.inputs])
        inputs = {name: file_hashes(cases, ["image", "label", "file"]) for name, cases in self.inputs.items()}
        provenance = {**self.known, **inputs, **options}
        claimed = claim_folder(self.output_dir, name=self.record, provenance=provenance)
        lock_folder(self.output_dir, self.shard)
        return claimed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unlock_folder(self.output_dir, self.shard)
