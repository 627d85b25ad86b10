"""Topology of binary masks and label maps: Betti numbers, components, contacts (numpy arrays, 3D).

Conventions: a mask is a 3D array whose non-zero voxels are foreground. Foreground is 26-connected and background
6-connected, the pair for which the Euler characteristic of a voxel set is consistent. What lies outside the array is
background. Lengths do not enter: everything here is counted in voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = [
    "attached_part",
    "betti_errors",
    "betti_numbers",
    "components_touching",
    "contact_areas",
    "euler_characteristic",
    "fill_cavities",
    "largest_components",
]

BoolArray = NDArray[np.bool_]

_NEIGHBOURS_26 = np.ones((3, 3, 3), dtype=bool)  # a voxel and its neighbours: the foreground is 26-connected


def as_3d(name: str, array: ArrayLike) -> NDArray:
    """Array (H, W, D); refuses other numbers of axes, naming the argument."""
    values = np.asarray(array)
    if values.ndim != 3:
        raise ValueError(
            f"{name} must be a 3D array (H, W, D), got shape {values.shape}; select one batch item and one channel."
        )
    return values


def as_mask(name: str, mask: ArrayLike) -> BoolArray:
    """Mask (H, W, D) bool, true where it is not zero; refuses other numbers of axes, naming the argument."""
    return as_3d(name, mask).astype(bool)


def same_shape(name_a: str, a: NDArray, name_b: str, b: NDArray) -> None:
    """Refuses two arrays of different shapes, naming both arguments."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape, got {a.shape} and {b.shape}; resample one first.")


def bounding_box(mask: BoolArray) -> tuple[slice, slice, slice]:
    """Smallest box of a non-empty mask."""
    spans = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    h, w, d = (slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    return h, w, d


def grown_box(box: Sequence[slice], voxels: Sequence[int]) -> tuple[slice, slice, slice]:
    """A box with so many voxels more on both sides of each axis, as far as there are any."""
    h, w, d = (slice(max(s.start - n, 0), s.stop + n) for s, n in zip(box, voxels, strict=True))
    return h, w, d


def _cavities(padded: BoolArray) -> tuple[BoolArray, int]:
    """Cavities of a mask with a background margin, and their number."""
    components, total = ndimage.label(~padded)
    outside = components[0, 0, 0]
    return (components > 0) & (components != outside), total - 1


def _or_next(mask: BoolArray, axis: int) -> BoolArray:
    """Whether a voxel or the next along an axis is in a mask; one shorter along it."""
    lines = np.moveaxis(mask, axis, 0)
    return np.moveaxis(lines[:-1] | lines[1:], 0, axis)


def euler_characteristic(mask: ArrayLike) -> int:
    """Euler characteristic of a 26-connected mask: corners - edges + faces - voxels of the cubes that it is made of.

    A face is there when a voxel on either side is, an edge when one of four is, a corner when one of eight is.

    Args:
        mask: (H, W, D), non-zero is foreground. May touch the border: the outside is background.

    Returns:
        an integer; 0 of an empty mask, 1 of one voxel.

    Raises:
        ValueError: if `mask` is not 3D.

    References:
        Kong & Rosenfeld, Digital topology: introduction and survey, CVGIP 1989.
    """
    voxels = np.pad(as_mask("mask", mask), 1)
    count, sides = np.count_nonzero, [_or_next(voxels, axis) for axis in range(3)]
    chi = sum(map(count, sides)) - count(voxels)
    along_h = _or_next(sides[0], 1)
    chi -= count(along_h) + count(_or_next(sides[0], 2)) + count(_or_next(sides[1], 2))
    return int(chi + count(_or_next(along_h, 2)))


def betti_numbers(mask: ArrayLike) -> tuple[int, int, int]:
    """Counts components, tunnels and cavities.

    With the Euler characteristic chi = b0 - b1 + b2 of the 26-connected foreground, b1 = b0 + b2 - chi. Every cavity
    is one of a single component, so they are counted in the box of each.

    Args:
        mask: (H, W, D), non-zero is foreground. May touch the border: the outside is background.

    Returns:
        (b0, b1, b2): 26-connected components; tunnels; cavities, i.e. 6-connected background components that do not
        reach the outside. An empty mask gives (0, 0, 0), one voxel (1, 0, 0).

    Raises:
        ValueError: if `mask` is not 3D.
    """
    foreground = as_mask("mask", mask)
    if not foreground.any():
        return 0, 0, 0
    cut = np.ascontiguousarray(foreground[bounding_box(foreground)])
    components, b0 = ndimage.label(cut, _NEIGHBOURS_26)
    boxes = ndimage.find_objects(components) if b0 > 1 else [(slice(None),) * 3]
    b2 = sum(_cavities(np.pad(components[box] == k, 1))[1] for k, box in enumerate(boxes, 1) if _may_hold(cut[box]))
    return int(b0), int(b0 + b2 - euler_characteristic(cut)), int(b2)


def _may_hold(part: BoolArray) -> bool:
    """Whether a box is large enough for a cavity: one voxel and a wall around it."""
    return min(part.shape) >= 3


def betti_errors(prediction: ArrayLike, truth: ArrayLike) -> tuple[int, int, int]:
    """Absolute differences of the Betti numbers of two masks.

    Args:
        prediction, truth: (H, W, D), non-zero is foreground; the shapes may differ.

    Returns:
        errors of (b0, b1, b2); all 0 if both masks are empty.

    Raises:
        ValueError: if an argument is not 3D.
    """
    e0, e1, e2 = (abs(a - b) for a, b in zip(betti_numbers(prediction), betti_numbers(truth), strict=True))
    return e0, e1, e2


def fill_cavities(mask: ArrayLike) -> BoolArray:
    """Adds the cavities (what b2 counts) to a mask. Tunnels and components stay; an empty mask stays empty.

    Args:
        mask: (H, W, D), non-zero is foreground.

    Returns:
        (H, W, D) bool, b2 = 0.

    Raises:
        ValueError: if `mask` is not 3D.
    """
    filled = as_mask("mask", mask).copy()
    if filled.any():
        box = bounding_box(filled)
        filled[box] |= _cavities(np.pad(filled[box], 1))[0][1:-1, 1:-1, 1:-1]
    return filled


def largest_components(mask: ArrayLike, count: int) -> BoolArray:
    """Keeps the `count` largest 26-connected components; of equal ones, those first in array order.

    Args:
        mask: (H, W, D), non-zero is foreground.
        count: how many to keep, at least 1. With fewer components than that, all are kept.

    Returns:
        (H, W, D) bool. An empty mask stays empty.

    Raises:
        ValueError: if `mask` is not 3D or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; to drop a label, set its voxels to 0 instead.")
    components, total = ndimage.label(as_mask("mask", mask), _NEIGHBOURS_26)
    sizes = np.bincount(components.ravel(), minlength=total + 1)[1:]
    return _of_ids(components, total, np.argsort(-sizes, kind="stable")[:count] + 1)


def _of_ids(components: NDArray, total: int, ids: NDArray) -> BoolArray:
    """Voxels of some of so many components, by a table: `np.isin` takes ten times as long."""
    chosen = np.zeros(total + 1, dtype=bool)
    chosen[ids] = True
    kept: BoolArray = chosen[components]
    return kept


def components_touching(mask: ArrayLike, other: ArrayLike) -> tuple[int, int]:
    """Counts the components of `mask` that touch `other`: a voxel of one is in, or a 26-neighbour of, the other.

    Args:
        mask: (H, W, D), for example a coronary label.
        other: (H, W, D), for example the aorta.

    Returns:
        (touching, total): 26-connected components of `mask` that touch, and all of them. An empty `mask` gives (0, 0),
        an empty `other` (0, total).

    Raises:
        ValueError: if an argument is not 3D or the shapes differ.
    """
    foreground, target = as_mask("mask", mask), as_mask("other", other)
    same_shape("mask", foreground, "other", target)
    components, total = ndimage.label(foreground, _NEIGHBOURS_26)
    return len(_touching(components, target)), int(total)


def _touching(components: NDArray, target: BoolArray) -> NDArray:
    """Ids of the components of which a voxel is in, or a 26-neighbour of, the target."""
    near = np.pad(target, 1)
    for axis in (0, 0, 1, 1, 2, 2):
        near = _or_next(near, axis)
    return np.unique(components[near & (components > 0)])


def attached_part(mask: ArrayLike, other: ArrayLike) -> BoolArray:
    """The components of `mask` that touch `other`, as `components_touching` counts them.

    Args:
        mask: (H, W, D), for example a coronary label.
        other: (H, W, D), for example the aorta.

    Returns:
        (H, W, D) bool, a subset of the mask; nothing where either is empty.

    Raises:
        ValueError: if an argument is not 3D or the shapes differ.
    """
    foreground, target = as_mask("mask", mask), as_mask("other", other)
    same_shape("mask", foreground, "other", target)
    components, total = ndimage.label(foreground, _NEIGHBOURS_26)
    return _of_ids(components, total, _touching(components, target))


def contact_areas(label_map: ArrayLike, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> dict[tuple[int, int], float]:
    """Measures the faces that labels share.

    6-neighbours, not 26: two surfaces that share a face really meet, while contacts over an edge or a corner come and
    go with every resampling, and these are compared before and after a deformation.

    Args:
        label_map: (H, W, D) integer labels, 0 is background.
        spacing_mm: voxel size along each axis, mm.

    Returns:
        (low, high) of each pair of different non-zero labels that meet -> area of all faces between them in mm^2, of
        the voxels as they are, so steps make it larger than that of a smooth surface. Empty for a single label.

    Raises:
        ValueError: if `label_map` is not 3D.
    """
    labels = as_3d("label_map", label_map)
    volume, areas = float(np.prod(spacing_mm)), dict[tuple[int, int], float]()
    for axis in range(3):
        lines = np.moveaxis(labels, axis, 0)
        here, there = lines[:-1], lines[1:]
        contact = (here != there) & (here != 0) & (there != 0)
        pairs = np.sort(np.stack([here[contact], there[contact]]), axis=0)
        found, faces = np.unique(pairs, axis=1, return_counts=True)
        for (a, b), count in zip(found.T.tolist(), faces.tolist(), strict=True):
            areas[a, b] = areas.get((a, b), 0.0) + count * volume / spacing_mm[axis]
    return areas
