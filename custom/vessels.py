"""Vessel trees as centre lines with radii: read from a mask, carried through a map, drawn again. Ours (layer 0).

Warping the voxels of a vessel two voxels wide breaks it; its centre line cannot break. Positions are in mm from the
centre of voxel (0, 0, 0), along the axes of the array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree

from custom.thinning import skeleton
from custom.topology import BoolArray, as_mask

__all__ = ["VesselTree", "carry", "draw", "fit_radii", "read_tree"]

Points = NDArray[np.float64]
_SMOOTHING_PASSES = 2
_FIT_STEPS = 12


@dataclass(frozen=True)
class VesselTree:
    """A forest of centre lines.

    Attributes:
        points_mm: (N, 3) positions.
        radii_mm: (N,) radii.
        edges: (E, 2) indices of linked points; without loops.
    """

    points_mm: Points
    radii_mm: NDArray[np.float64]
    edges: NDArray[np.intp]


def read_tree(mask: ArrayLike, spacing_mm: Sequence[float]) -> VesselTree:
    """Reads centre lines and radii from a mask: skeleton, minimum spanning forest, distance to the wall.

    Positions and radii are averaged with their neighbours along the tree, twice, ends apart: a skeleton runs in steps
    of whole voxels.

    Args:
        mask: (H, W, D), non-zero is vessel. Loops lose their longest link.
        spacing_mm: voxel size along each axis, mm.

    Returns:
        The forest, with one tree a component; without points for an empty mask.

    Raises:
        ValueError: if `mask` is not 3D.
    """
    vessel = as_mask("mask", mask)
    voxels = np.argwhere(skeleton(vessel))
    if len(voxels) == 0:
        return VesselTree(np.zeros((0, 3)), np.zeros(0), np.zeros((0, 2), np.intp))
    wall = ndimage.distance_transform_edt(np.pad(vessel, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    points, radii = voxels * np.array(spacing_mm, float), wall[tuple(voxels.T)]
    pairs = cKDTree(voxels).query_pairs(1.8, output_type="ndarray")
    lengths = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    forest = minimum_spanning_tree(coo_matrix((lengths, pairs.T), (len(voxels),) * 2)).tocoo()
    edges = np.stack([forest.row, forest.col], 1).astype(np.intp)
    degree = np.bincount(edges.ravel(), minlength=len(points))
    for _ in range(_SMOOTHING_PASSES):
        sums = np.concatenate([points, radii[:, None]], 1)
        for here, there in (edges.T, edges.T[::-1]):
            np.add.at(sums, here, np.concatenate([points, radii[:, None]], 1)[there])
        means = sums / (degree + 1)[:, None]
        points = np.where(degree[:, None] > 1, means[:, :3], points)
        radii = means[:, 3]
    return VesselTree(points, radii, edges)


def carry(tree: VesselTree, mapping: Callable[[Points], Points]) -> VesselTree:
    """Moves a tree: `mapping` takes positions (N, 3) in mm to where they go. Radii and links stay."""
    return replace(tree, points_mm=mapping(tree.points_mm))


def draw(tree: VesselTree, shape: Sequence[int], spacing_mm: Sequence[float]) -> BoolArray:
    """Draws a tree as cones with round ends; a chain of face-linked voxels at least, so that thin vessels do not break.

    Args:
        tree: may reach beyond the grid; that part is not drawn.
        shape: (H, W, D).
        spacing_mm: voxel size along each axis, mm.

    Returns:
        (H, W, D) bool.
    """
    spacing, mask = np.array(spacing_mm, float), np.zeros(tuple(shape), bool)
    lonely = np.setdiff1d(np.arange(len(tree.points_mm)), tree.edges)
    for a, b in [*tree.edges, *np.stack([lonely, lonely], 1)]:
        start, end, r0, r1 = tree.points_mm[a], tree.points_mm[b], tree.radii_mm[a], tree.radii_mm[b]
        reach = max(r0, r1) + spacing.max()
        low = np.clip(np.floor((np.minimum(start, end) - reach) / spacing), 0, shape).astype(int)
        high = np.clip(np.ceil((np.maximum(start, end) + reach) / spacing) + 1, 0, shape).astype(int)
        if (high <= low).any():
            continue
        box = tuple(slice(i, j) for i, j in zip(low, high, strict=True))
        position = np.stack(np.meshgrid(*(np.arange(i, j) for i, j in zip(low, high, strict=True)), indexing="ij"), -1)
        offset, along = position * spacing - start, end - start
        share = np.clip(offset @ along / max(float(along @ along), 1e-12), 0, 1)
        mask[box] |= np.linalg.norm(offset - share[..., None] * along, axis=-1) <= r0 + share * (r1 - r0)
        _draw_line(mask, start / spacing, end / spacing)
    return mask


def _draw_line(mask: BoolArray, start: Points, end: Points) -> None:
    """Sets the voxels that a segment (in voxels) passes, one axis at a time, so that they share faces."""
    steps = int(np.ceil(4 * np.abs(end - start).max())) + 1
    path = np.rint(start + np.linspace(0, 1, steps)[:, None] * (end - start)).astype(int)
    corners = [path[:-1].copy(), path[:-1].copy()]
    corners[0][:, 0] = path[1:, 0]
    corners[1][:, :2] = path[1:, :2]
    voxels = np.concatenate([path, *corners])
    voxels = voxels[((voxels >= 0) & (voxels < mask.shape)).all(1)]
    mask[tuple(voxels.T)] = True


def fit_radii(tree: VesselTree, volume_mm3: float, shape: Sequence[int], spacing_mm: Sequence[float]) -> VesselTree:
    """Adds one length to all radii so that the drawn tree has a given volume, by bisection.

    The distance to the wall, read at voxel centres, is off by up to a voxel, always in the same direction.

    Args:
        tree: to be drawn on the grid `shape` of `spacing_mm`.
        volume_mm3: wanted; out of reach of 2 voxels more or fewer, the nearest radius in reach is taken.

    Returns:
        The tree with its new radii, none below 0.
    """
    low, high = -2 * max(spacing_mm), 2 * max(spacing_mm)
    for _ in range(_FIT_STEPS):
        middle = (low + high) / 2
        drawn = draw(replace(tree, radii_mm=np.maximum(tree.radii_mm + middle, 0)), shape, spacing_mm)
        low, high = (middle, high) if drawn.sum() * np.prod(spacing_mm) < volume_mm3 else (low, middle)
    return replace(tree, radii_mm=np.maximum(tree.radii_mm + (low + high) / 2, 0))
