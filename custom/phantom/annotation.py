"""Label noise like an annotator's: boundaries shifted smoothly by about half a voxel, distal vessels missing."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.labels import LABELS
from custom.phantom.layers import box_of, smooth_field
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree

__all__ = ["annotate"]

_SHIFT_VOXELS = (0.3, 0.6)  # ours: SD of the displacement of a boundary along each axis
_SMOOTH_MM = 6.0  # ours: over which a hand does not shake
# Ours: a hand follows a vessel of two voxels better than the wall of a chamber: around it the shift is a third.
_THIN_VOXELS, _FOLLOWED = 2.0, 12.0
# Ours: the share of a vessel's length that is kept, and where it begins.
_KEPT = {"coronaries": (0.55, 1.0, "aorta"), "pulmonary_veins": (0.6, 1.0, "left_atrium")}


def annotate(label: NDArray[np.uint8], spacing_mm: float, rng: np.random.Generator) -> tuple[NDArray[np.uint8], dict]:
    """Draws what an annotator would have made of an exact label map.

    Args:
        label: (H, W, D), exact, ids of `LABELS`.
        spacing_mm: isotropic voxel size.
        rng: all randomness.

    Returns:
        The label map (H, W, D), whose topology is not promised; and what was drawn.
    """
    drawn: dict[str, Any] = {"shift_voxels": float(rng.uniform(*_SHIFT_VOXELS))}
    out = label.copy()
    for name, (low, high, source) in _KEPT.items():
        drawn[f"{name}_kept"] = float(rng.uniform(low, high))
        out[_distal(label, LABELS[name], LABELS[source], drawn[f"{name}_kept"])] = 0
    where = np.indices(label.shape, dtype=np.float32)
    thin = ndimage.gaussian_filter((label == LABELS["coronaries"]).astype(np.float32), _THIN_VOXELS)
    shift = np.float32(drawn["shift_voxels"]) * (1 - np.clip(_FOLLOWED * thin, 0, 0.7))
    for axis in range(3):
        where[axis] += shift * smooth_field(label.shape, _SMOOTH_MM / spacing_mm, rng)
    return ndimage.map_coordinates(out, where, order=0, mode="nearest"), drawn


def _distal(label: NDArray[np.uint8], k: int, source: int, kept: float) -> NDArray[np.bool_]:
    """Voxels of label k, in each of its pieces beyond a share of the longest way from the label that it leaves."""
    out = np.zeros(label.shape, bool)
    box = box_of(label == k, 2)
    if box is None:
        return out
    part = label[box]
    place = np.argwhere(part == k)
    pairs = cKDTree(place).query_pairs(1.75, output_type="ndarray")
    length = np.linalg.norm(place[pairs[:, 0]] - place[pairs[:, 1]], axis=1)
    graph = coo_matrix((length, (pairs[:, 0], pairs[:, 1])), shape=(len(place), len(place)))
    begins = ndimage.binary_dilation(part == source, np.ones((3, 3, 3)))[tuple(place.T)]
    pieces = ndimage.label(part == k, np.ones((3, 3, 3)))[0][tuple(place.T)]
    for piece in range(1, int(pieces.max()) + 1):
        roots = np.flatnonzero(begins & (pieces == piece))
        if len(roots) == 0:
            continue
        way = dijkstra(graph, directed=False, indices=roots, min_only=True)
        far = place[(pieces == piece) & (way > kept * way[pieces == piece].max())]
        out[box][tuple(far.T)] = True
    return out
