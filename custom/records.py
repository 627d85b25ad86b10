"""Layer 1: files that are absent or whole, and folders that hold the results of one run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

__all__ = [
    "claim_folder",
    "content_hash",
    "file_hash",
    "file_hashes",
    "lock_folder",
    "part_of",
    "plain_values",
    "replace_file",
    "unlock_folder",
    "write_json",
]

_LOCKS: dict[str, TextIO] = {}


def part_of(path: Path) -> Path:
    """Hidden neighbour to write to; no two processes share one, also of machines that share a folder."""
    return path.with_name(f".part_{platform.node()}_{os.getpid()}_{path.name}")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes to a hidden neighbour, then moves it in place; its folder is made. An error leaves no part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically, one space deep."""
    replace_file(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def content_hash(*parts: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256 of all parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def file_hash(file: str) -> str:
    """`content_hash` of what a file holds.

    Raises:
        FileNotFoundError: naming the file.
    """
    return content_hash(Path(file).read_bytes())


def file_hashes(cases: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    """File -> `content_hash` of what it holds, for all files that cases name under `keys`."""
    files = sorted({str(case[key]) for case in cases for key in keys if key in case})
    return {file: file_hash(file) for file in files}


def plain_values(value: Any) -> Any:
    """What JSON gives back for a value: dataclasses and mappings as dictionaries, sequences as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_values(v) for v in value]
    return value


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
