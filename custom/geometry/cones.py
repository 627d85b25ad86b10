"""Distances to chains of cones with round ends, which vessels and tubes are drawn as (numpy arrays, 3D)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["lower_to_cones"]

_MIN_SQUARED_MM2 = 1e-12  # ours: a cone of length 0 is a ball, not a division by zero


def _distance(axes: Sequence[NDArray[Any]], start: NDArray[Any], end: NDArray[Any], radii: Sequence[float]) -> NDArray:
    """Distance of the voxels of a box to one cone; `axes` are their positions along each axis."""
    kind, along = axes[0].dtype.type, end - start
    x, y, z = np.ix_(*(axis - kind(first) for axis, first in zip(axes, start, strict=True)))
    share = (x * along[0] + y * along[1] + z * along[2]) / max(float(along @ along), _MIN_SQUARED_MM2)
    share = np.clip(share, 0, 1).astype(kind)
    from_axis = np.sqrt((x - share * along[0]) ** 2 + (y - share * along[1]) ** 2 + (z - share * along[2]) ** 2)
    return from_axis - (radii[0] + share * (radii[1] - radii[0]))


def lower_to_cones(
    distance: NDArray[Any],
    points_mm: NDArray[Any],
    radii_mm: NDArray[Any],
    links: Iterable[Sequence[int]],
    *,
    spacing_mm: Sequence[float],
    origin_voxels: Sequence[float] = (0.0, 0.0, 0.0),
    reach_mm: float,
) -> None:
    """Lowers distances, in place, to those to the surface of cones with round ends; negative inside.

    Args:
        distance: (H, W, D) mm, float32 or float64: positions of voxels are rounded to that.
        points_mm: (N, 3) ends of cones; may lie beyond the grid.
        radii_mm: (N,) radii there.
        links: pairs of points, a cone each; twice the same point is a ball.
        spacing_mm: voxel size along each axis, mm.
        origin_voxels: index, whole or not, of the position (0, 0, 0).
        reach_mm: what is farther from the box around a cone is left as it is.
    """
    spacing, origin, shape = np.array(spacing_mm, float), np.array(origin_voxels, float), distance.shape
    axes = [((np.arange(n) - o) * s).astype(distance.dtype) for n, o, s in zip(shape, origin, spacing, strict=True)]
    for a, b in links:
        start, end, radii = points_mm[a], points_mm[b], (radii_mm[a], radii_mm[b])
        margin = max(radii) + reach_mm
        low = np.clip(np.floor((np.minimum(start, end) - margin) / spacing + origin), 0, shape).astype(int)
        high = np.clip(np.ceil((np.maximum(start, end) + margin) / spacing + origin) + 1, 0, shape).astype(int)
        if (low < high).all():
            box = tuple(slice(i, j) for i, j in zip(low, high, strict=True))
            near = _distance([axis[part] for axis, part in zip(axes, box, strict=True)], start, end, radii)
            np.minimum(distance[box], near, out=distance[box])
