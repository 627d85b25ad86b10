"""Noise of a case, and the limits of what is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

HU_RANGE = (-1024.0, 3071.0)
"""Limits of rendered images: what 12 bits of a CT hold."""


def case_noise(shape: Sequence[int], seed: int, case: str) -> torch.Tensor:
    """Standard normal noise of one case, from seed, case name and shape alone, not batch, order, rank or device."""
    # One 32-bit number from both: a CPU generator ignores the upper half of its seed.
    digest = hashlib.sha256(f"{seed}:{case}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(tuple(shape), generator=generator)
