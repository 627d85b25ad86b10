"""Whether the machine has the memory that a run will take."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


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
