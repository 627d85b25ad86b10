"""Surfaces of binary masks and the distances between two of them (numpy arrays, 3D)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from custom.geometry.topology import BoolArray, as_mask, same_shape
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

__all__ = ["surface", "surface_distances"]


def surface(mask: ArrayLike) -> BoolArray:
    """Voxels of a mask that share a face with the background; what lies outside the array is background.

    Args:
        mask: (H, W, D), non-zero is foreground.

    Returns:
        (H, W, D) bool, a subset of the mask; a voxel without neighbours is all surface.

    Raises:
        ValueError: if `mask` is not 3D.
    """
    foreground = as_mask("mask", mask)
    core = np.zeros_like(foreground)
    core[1:-1, 1:-1, 1:-1] = True
    for axis in range(3):
        lines, inside = np.moveaxis(foreground, axis, 0), np.moveaxis(core, axis, 0)
        inside[1:-1] &= lines[2:]
        inside[1:-1] &= lines[:-2]
    return foreground & ~core


def surface_distances(
    mask: ArrayLike, other: ArrayLike, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distance of every surface voxel of a mask to the nearest surface voxel of another, and the reverse.

    The values of MONAI's `get_edge_surface_distance`, in a quarter of the time: only what is not surface of both is
    asked for, and of a tree that is split at midpoints. MONAI's is split at medians, which on a grid are the coordinate
    of many voxels.

    Args:
        mask, other: (H, W, D), non-zero is foreground; neither is empty.
        spacing_mm: voxel size along each axis, mm.

    Returns:
        mm, of the surface voxels of `mask` and of `other`, those that lie on both first.

    Raises:
        ValueError: if an argument is not 3D or is empty, or the shapes differ.
    """
    same_shape("mask", as_mask("mask", mask), "other", as_mask("other", other))
    here, there = surface(mask), surface(other)
    if not here.any() or not there.any():
        raise ValueError("mask and other must both hold a voxel, to measure how far their surfaces are apart.")
    shared = np.zeros(np.count_nonzero(here & there), dtype=np.float32)
    alone = [_positions(one & ~two, spacing_mm) for one, two in ((here, there), (there, here))]
    trees = [KDTree(_positions(one, spacing_mm), balanced_tree=False, compact_nodes=False) for one in (there, here)]
    threads = torch.get_num_threads()
    pairs = zip(trees, alone, strict=True)
    first, second = (tree.query(points, workers=threads)[0].astype(np.float32) for tree, points in pairs)
    return np.concatenate([shared, first]), np.concatenate([shared, second])


def _positions(mask: BoolArray, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """Places (N, 3) of the voxels of a mask, mm."""
    places = np.unravel_index(np.flatnonzero(mask), mask.shape)  # `np.argwhere` takes ten times as long
    return np.stack(places, 1).astype(np.float64) * np.asarray(spacing_mm)
