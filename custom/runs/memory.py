"""Memory of a run: whether the machine has as much, and what becomes of that which is freed."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 2**31 - 1  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Have freed memory kept for the next volume, by glibc's mallopt(3); other systems are left as they are.

    glibc gives a block of megabytes back as soon as it is freed, and has it filled with zeros when it is asked for
    again: a third of the time of a network's call on a CPU (docs/FINDINGS.md).

    Returns:
        whether it was done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except (AttributeError, OSError):  # another C library
        return False
    return mallopt is not None and all(mallopt(option, _LARGEST) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


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
