"""Memory of a run: whether the machine has as much, and what becomes of that which is freed."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

_KEPT = {-3: 2**28, -1: 2**31 - 1}
"""Of mallopt(3): blocks from M_MMAP_THRESHOLD on go back at once, others where M_TRIM_THRESHOLD are free at the end.

Larger than what a network needs for a window are whole volumes, whose gaps would stay."""


def keep_freed_memory() -> bool:
    """Have freed memory kept for the next volume, by glibc's mallopt(3); other systems are left as they are.

    glibc gives a block of megabytes back as soon as it is freed, and has it filled with zeros when it is asked for
    again: a third of the time of a network's call on a CPU (docs/FINDINGS.md). Blocks of up to 256 MiB are kept.

    Returns:
        whether it was done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except (AttributeError, OSError):  # another C library
        return False
    return mallopt is not None and all(mallopt(option, value) for option, value in _KEPT.items())


def machine_memory() -> int | None:
    """Bytes of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def warn_of_memory(needed: float, remedy: str) -> None:
    """Warn before a run that will need more than the machine has: the system ends such runs without a word.

    Args:
        needed: bytes of all processes together.
        remedy: what to change, after a semicolon.
    """
    there = machine_memory()
    if there is not None and needed > there:
        logger.warning(
            "this will need about %.0f GiB of memory, the machine has %.0f; %s", needed / 2**30, there / 2**30, remedy
        )
