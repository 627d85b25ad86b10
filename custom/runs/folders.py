"""Folders that hold the results of one run: whose they are, and who is at work in them."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from custom.runs.files import content_hash, plain_values, write_json

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
