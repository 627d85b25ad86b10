"""Which cases of a run are done: their files are there, and whole."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SMALLEST_NIFTI = 348  # bytes of its header


def has_volume(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether `output_dir/<case>.nii.gz` is there and whole; one that was cut short later is made again."""
    return is_whole_volume(Path(output_dir, f"{case['case']}.nii.gz"))


def is_whole_volume(path: Path) -> bool:
    """Whether a `.nii.gz` file is there and can be unpacked to its end; a damaged one is said in the log."""
    if not path.is_file():
        return False
    size = 0
    try:
        with gzip.open(path) as file:
            while part := file.read(1 << 20):
                size += len(part)
    except (OSError, EOFError, zlib.error):
        size = 0
    if size < _SMALLEST_NIFTI:
        logger.warning("%s is damaged and is made again", path)
    return size >= _SMALLEST_NIFTI


def unfinished(
    cases: Sequence[dict[str, Any]],
    output_dir: str,
    *,
    done: Callable[[Mapping[str, Any], str], bool] = has_volume,
    shard: int = 0,
    shards: int = 1,
) -> list[dict[str, Any]]:
    """Cases that are still to be made, or have to be made again.

    Args:
        cases: all of the run.
        output_dir: of the run, shared by all processes.
        done: case and folder -> whether its results are there.
        shard, shards: number of the process, from 0, and of processes; each takes every `shards`-th case.

    Raises:
        ValueError: when there is no such shard.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard: must be 0 to {shards - 1} of {shards} shards, got {shard}")
    return [case for case in cases[shard::shards] if not done(case, output_dir)]
