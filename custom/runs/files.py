"""Files that are absent or whole, and hashes of what they hold."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

logger = logging.getLogger(__name__)


def process_mark(kind: str) -> str:
    """How a hidden name begins of what this process has not finished, here and in a folder that machines share."""
    return f".{kind}_{platform.node()}_{os.getpid()}_"


def part_of(path: Path) -> Path:
    """Hidden neighbour to write to; no two processes share one, also of machines that share a folder."""
    return path.with_name(process_mark("part") + path.name)


_LEFT_AFTER_S = 3600  # ours: what is being written changes every few seconds


def remove_leftovers(folder: str | os.PathLike, *, below: bool = False) -> None:
    """Removes what killed processes left half-written in a folder: `.part_*`, `.mlflow_*`.

    What a process of this machine is at work on stays, and what changed within the last hour on another machine.

    Args:
        folder: without it nothing happens.
        below: look into the folders in it as well.
    """
    root = Path(folder)
    for kind in ("part", "mlflow"):
        for path in sorted((root.rglob if below else root.glob)(f".{kind}_*")):
            if _is_left(path, kind):
                logger.warning("%s was left by a process that was killed, and is removed", path)
                with suppress(OSError):  # it stands in nobody's way
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_left(path: Path, kind: str) -> bool:
    try:
        age_s = time.time() - path.lstat().st_mtime
    except FileNotFoundError:  # its process has just finished it
        return False
    process = path.name.removeprefix(f".{kind}_{platform.node()}_").split("_")[0]
    ended = process.isdecimal() and sys.platform != "win32" and not _is_running(int(process))
    return ended or age_s > _LEFT_AFTER_S


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


_REMEDIES = {
    **dict.fromkeys(("ENOSPC", "EDQUOT"), "make room there"),
    **dict.fromkeys(("EROFS", "EACCES", "EPERM"), "make the folder writable"),
    **dict.fromkeys(("EEXIST", "ENOTDIR"), "move the file away that lies in its place"),
    "EFBIG": "raise the limit of the size of files (ulimit -f)",
}


def disk_remedy(error: OSError, option: str) -> str:
    """What to do when a folder or file cannot be written; `option` would name another place."""
    known = _REMEDIES.get(errno.errorcode.get(error.errno or 0, ""), "make room or mend the disk there")
    return f"{known}, or choose another {option}"


@contextmanager
def named_folder(folder: Path, option: str) -> Iterator[None]:
    """Says which folder cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{reason}; {disk_remedy(error, option)}", str(folder)) from error


def make_folder(output_dir: str) -> None:
    """Makes a folder for results, if there is none.

    Raises:
        OSError: naming the folder that cannot be made, and the option.
    """
    with named_folder(Path(output_dir), "output_dir"):
        Path(output_dir).mkdir(parents=True, exist_ok=True)


def replace_file(path: Path, write: Callable[[Path], Any], *, option: str = "output_dir") -> None:
    """Writes to a hidden neighbour, then moves it in place; its folder is made. An error leaves no part of it.

    Args:
        path: of the file.
        write: fills the file whose path it is given.
        option: that names another place, for the message.

    Raises:
        OSError: naming the file, when the disk is full or the folder cannot be written, and the remedy.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = disk_remedy(error, option)
        raise OSError(error.errno, f"{reason}; nothing was written, {remedy}", str(path)) from error
    finally:
        if part.exists():
            part.unlink()


def write_json(path: Path, content: Mapping[str, Any], *, option: str = "output_dir") -> None:
    """Writes JSON as :func:`replace_file`, one space deep; numbers that are not finite, which it has not, are null."""
    text = json.dumps(plain_values(content), indent=1, allow_nan=False)
    replace_file(path, lambda part: part.write_text(text + "\n"), option=option)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: naming the file, what is wrong with it, and the remedy.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:  # of json, of characters that are no text, and of a folder
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: is damaged ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is damaged (it must hold one JSON object); {remedy}")
    return content


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV atomically: a column for every key, as they appear; cells of what is absent or NaN stay empty."""
    table = pd.DataFrame(list(rows), dtype=object)  # else whole numbers beside an empty cell would get a fraction
    replace_file(path, lambda part: table.to_csv(part, index=False, lineterminator="\r\n"))  # RFC 4180


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
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"{file}: there is no such file; of weights: train first, or point `ckpt_dir` to a folder with "
            f"{Path(file).name}; "
            "else make it, or correct the option that names it"
        )
    return content_hash(Path(file).read_bytes())


def file_hashes(cases: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    """File -> `content_hash` of what it holds, for all files that cases name under `keys`."""
    files = sorted({str(case[key]) for case in cases for key in keys if key in case})
    return {file: file_hash(file) for file in files}


_ABSENT = "not set"


def differences(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Name -> (before, now) of what differs between two plain values; of dictionaries the innermost names, by `#`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*before, *now}):
            inner = f"{name}#{key}" if name else str(key)
            found |= differences(before.get(key, _ABSENT), now.get(key, _ABSENT), inner)
        return found
    return {} if before == now else {name: (before, now)}


def plain_values(value: Any) -> Any:
    """What JSON gives back for a value: dataclasses and mappings as dictionaries, sequences as lists, NaN as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_values(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
