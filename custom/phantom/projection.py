"""Streaks of a clinic phantom: what a spectrum of two energies does to projections of water and dense matter.

Each axial slice is projected, the rays are attenuated at both energies, corrected as if all were water (which scanners
do), and the error that is left is brought back by filtered back-projection. So it is dark between dense things, bright
beside them, and grows with them by itself.
"""

from __future__ import annotations

import numpy as np
from custom.phantom.geometry import Array
from numpy.typing import NDArray
from scipy import ndimage, sparse

__all__ = ["beam_hardening"]

_VIEWS, _WIDEST = 150, 104  # projections; pixels across, to which a slice is reduced
_WATER_PER_MM = 0.020  # attenuation at about 65 keV
_DENSE_HU = 130.0  # what is above is bone, contrast agent or metal
# Attenuation at 50 and at 85 keV over that at 65 keV: water; and between iodine (2.0, 0.5) and bone (1.5, 0.8).
_WATER, _DENSE = (1.13, 0.89), (1.75, 0.65)
_RAY_LIMIT = 12.0  # ours: rays that no photon passes are no longer told apart


def _system(shape: tuple[int, int]) -> tuple[sparse.csr_matrix, int]:
    """Matrix (views * bins, pixels) that shares every pixel between the two bins around it; and the number of bins."""
    bins = int(np.ceil(np.hypot(*shape))) + 3
    x, y = (np.arange(n) - (n - 1) / 2 for n in shape)
    angles = np.arange(_VIEWS) * np.pi / _VIEWS
    place = np.cos(angles)[:, None, None] * x[:, None] + np.sin(angles)[:, None, None] * y[None]
    place = place.reshape(_VIEWS, -1) + (bins - 1) / 2
    first = np.floor(place).astype(np.int64)
    share = (place - first).astype(np.float32)
    rows = first + np.arange(_VIEWS)[:, None] * bins
    columns = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    entries = (np.stack([1 - share, share]).ravel(), (np.stack([rows, rows + 1]).ravel(), np.tile(columns.ravel(), 2)))
    return sparse.csr_matrix(entries, shape=(_VIEWS * bins, rows.shape[1])), bins


def _measured(water: Array, dense: Array) -> Array:
    """Attenuation of rays by both energies together, corrected to that of water; (N,) in units of attenuation."""

    def attenuation(w: Array, d: Array) -> Array:
        passed = [np.exp(-np.minimum(a * w + b * d, _RAY_LIMIT)) for a, b in zip(_WATER, _DENSE, strict=True)]
        return -np.log(0.5 * (passed[0] + passed[1]))

    table = np.linspace(0, 2 * _RAY_LIMIT, 600, dtype=np.float32)
    return np.interp(attenuation(water, dense), attenuation(table, np.zeros_like(table)), table).astype(np.float32)


def _filtered(error: NDArray, bins: int) -> Array:
    """Ramp filter along the bins, softened by a Hann window: (views, bins, slices)."""
    size = 2 ** int(np.ceil(np.log2(2 * bins)))
    frequency = np.fft.rfftfreq(size)
    ramp = frequency * (0.5 + 0.5 * np.cos(2 * np.pi * frequency))
    spectrum = np.fft.rfft(error, size, axis=1) * ramp[None, :, None]
    return np.fft.irfft(spectrum, size, axis=1)[:, :bins].astype(np.float32)


def beam_hardening(hu: Array, spacing_mm: float, strength: float) -> Array:
    """Error in HU (H, W, D) that beam hardening makes in an image, to add to it.

    Args:
        hu: (H, W, D), slices along the last axis.
        spacing_mm: isotropic voxel size.
        strength: 1: as computed; less for a scanner that corrects for bone as well.

    An image without anything dense gets zeros, but for rounding.
    """
    step = int(np.ceil(max(hu.shape[:2]) / _WIDEST))
    pad = [(0, -n % step) for n in hu.shape[:2]] + [(0, 0)]
    whole = np.pad(hu, pad, mode="edge")
    a, b = (n // step for n in whole.shape[:2])
    small = whole.reshape(a, step, b, step, -1).mean(axis=(1, 3)).reshape(a * b, -1)
    system, bins = _system((a, b))
    mm = np.float32(step * spacing_mm * _WATER_PER_MM)
    soft = np.clip(small, -1000, _DENSE_HU)
    water = system @ ((1 + soft / 1000) * mm).astype(np.float32)
    dense = system @ ((small - soft).clip(0) / 1000 * mm).astype(np.float32)
    wrong = _measured(water.ravel(), dense.ravel()).reshape(water.shape) - np.minimum(water + dense, 2 * _RAY_LIMIT)
    back = _filtered(wrong.reshape(_VIEWS, bins, -1), bins).reshape(wrong.shape)
    error = (system.T @ back) * np.float32(np.pi / _VIEWS / mm * 1000)
    image = np.repeat(np.repeat(error.reshape(a, b, -1), step, 0), step, 1)[: hu.shape[0], : hu.shape[1]]
    if step > 1:
        image = ndimage.uniform_filter1d(ndimage.uniform_filter1d(image, step, 0), step, 1)
    return np.float32(strength) * image
