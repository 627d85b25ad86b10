"""Files that are absent or whole, and hashes of what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd


def part_of(path: Path) -> Path:
    """Hidden neighbour to write to; no two processes share one, also of machines that share a folder."""
    return path.with_name(f".part_{platform.node()}_{os.getpid()}_{path.name}")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes to a hidden neighbour, then moves it in place; its folder is made. An error leaves no part of it.

    Raises:
        OSError: naming the file, when the disk is full or the folder cannot be written.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"{reason}; nothing was written, make room or change the folder", str(path)
        ) from error
    finally:
        if part.exists():
            part.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically, one space deep."""
    replace_file(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


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
