"""Artefacts of cardiac CT: calcified plaques, streaks and motion, each from what was drawn of it. Ours.

Places are in mm from the middle of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["PLAQUE_HU", "PLAQUE_RADIUS_MM", "SPOKES", "STREAK_HU", "add_plaque", "add_streaks", "blur_by_motion"]

PLAQUE_HU = (650.0, 1100.0)  # about the 770 HU of studies of calcified plaques
PLAQUE_RADIUS_MM = (0.7, 1.6)  # ours, by eye
STREAK_HU = (20.0, 90.0)  # amplitude beside dense contrast; ours, by eye
SPOKES = (5, 9, 13, 19)  # waves around the source, none of which divides another; ours, by eye
_STREAK_MM = (6.0, 30.0, 25.0)  # ours: radius from which on there are any, fall-off in plane and along z
_MOTION_STEPS = 5  # ours: positions that a moving vessel is averaged over
_AROUND_MM = 3.0  # ours: what moves along with a vessel


def _axes_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> list[NDArray[np.float32]]:
    return [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(shape, spacing_mm, strict=True)]


def add_plaque(
    hu: NDArray[np.float32],
    centre_mm: Sequence[float],
    *,
    radius_mm: float,
    plaque_hu: float,
    spacing_mm: Sequence[float],
) -> None:
    """Paint a calcified ball over an image (H, W, D), in place; voxels at its surface are covered in part."""
    axes = _axes_mm(hu.shape, spacing_mm)
    distance = np.sqrt(sum(a**2 for a in np.ix_(*(axes[i] - np.float32(centre_mm[i]) for i in range(3)))))
    cover = np.clip(0.5 - (distance - radius_mm) / np.float32(min(spacing_mm)), 0, 1)
    hu += cover * (np.float32(plaque_hu) - hu)


def add_streaks(
    hu: NDArray[np.float32],
    source_mm: Sequence[float],
    *,
    phases: Sequence[float],
    strength_hu: float,
    spacing_mm: Sequence[float],
) -> None:
    """Add spokes that leave a source of dense contrast in the axial plane, to an image (H, W, D), in place.

    Args:
        hu: of the image.
        source_mm: where they come from.
        phases: one for each of `SPOKES`, radians.
        strength_hu: amplitude at the source.
        spacing_mm: along each axis.
    """
    axes, (inner_mm, in_plane_mm, along_mm) = _axes_mm(hu.shape, spacing_mm), _STREAK_MM
    x, y = axes[0][:, None] - source_mm[0], axes[1][None] - source_mm[1]
    angle, radius = np.arctan2(y, x), np.sqrt(x**2 + y**2)
    spokes = sum(np.cos(n * angle + phase) for n, phase in zip(SPOKES, phases, strict=True)) / 2
    depth = np.exp(-(((axes[2] - source_mm[2]) / along_mm) ** 2))
    plane = spokes * np.exp(-radius / in_plane_mm) * (radius > inner_mm)
    hu += np.float32(strength_hu) * plane[..., None] * depth


def blur_by_motion(
    hu: NDArray[np.float32],
    vessel: NDArray[np.float32],
    *,
    motion_mm: float,
    heading: float,
    spacing_mm: Sequence[float],
) -> None:
    """Average what lies around a vessel over a short motion in the axial plane, in place.

    Args:
        hu: image (H, W, D).
        vessel: (H, W, D), 1 in its voxels and 0 elsewhere.
        motion_mm: from first to last position.
        heading: direction, radians.
        spacing_mm: along each axis.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    steps = np.linspace(-0.5, 0.5, _MOTION_STEPS)[:, None] * motion_mm / spacing[:2]
    steps = steps * np.array([np.cos(heading), np.sin(heading)])
    moved = sum(ndimage.shift(hu, (dx, dy, 0.0), order=1, mode="nearest") for dx, dy in steps) / len(steps)
    near = ndimage.gaussian_filter(ndimage.grey_dilation(vessel, 5), _AROUND_MM / spacing)
    hu += np.clip(2.0 * near, 0, 1) * (moved - hu)
