"""Masks changed voxel by voxel without a change of topology: centre lines, and growth (numpy arrays, 3D).

A voxel is simple when adding or removing it changes no Betti number. Connectivity as in `custom.geometry.topology`:
26 for the foreground, 6 for the background; what lies outside the array is background.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from custom.geometry.topology import BoolArray, as_mask, attached_part, bounding_box, same_shape
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = ["cl_dice", "grow", "centreline_attached", "centreline_recovered", "line_lengths", "skeleton"]

# The 26 neighbours of a voxel, which of them share a face or an edge with it, and which are neighbours of one another:
# the neighbourhoods of Bertrand & Malandain 1994.
_OFFSETS = np.array([o for o in product((-1, 0, 1), repeat=3) if o != (0, 0, 0)])
_FACES = np.abs(_OFFSETS).sum(1) == 1
_WITHIN_18 = np.abs(_OFFSETS).sum(1) <= 2
_LINKS_26 = (np.abs(_OFFSETS[:, None] - _OFFSETS[None]).max(2) <= 1).astype(np.float32)
_LINKS_6 = (np.abs(_OFFSETS[:, None] - _OFFSETS[None]).sum(2) <= 1).astype(np.float32)


def _reached(members: BoolArray, starts: BoolArray, links: NDArray[np.float32]) -> BoolArray:
    """Members (N, 26) of each neighbourhood that are linked to the first start; none where there is no start."""
    reached = np.zeros_like(members)
    rows = np.arange(len(members))
    first = starts.argmax(1)
    reached[rows, first] = starts[rows, first]
    while True:
        grown = (reached.astype(np.float32) @ links > 0) & members
        if (grown == reached).all():
            return reached
        reached = grown


def _is_simple(neighbours: BoolArray) -> BoolArray:
    """Which voxels can go without a change of topology (Bertrand & Malandain 1994), from their (N, 26) neighbours.

    One 26-component of foreground around the voxel, and one 6-component of background that shares a face with it,
    within its 18 neighbours.
    """
    one_object = (_reached(neighbours, neighbours, _LINKS_26) == neighbours).all(1) & neighbours.any(1)
    background = ~neighbours & _WITHIN_18
    faces = background & _FACES
    one_background = (_reached(background, faces, _LINKS_6) >= faces).all(1) & faces.any(1)
    return one_object & one_background


def _neighbourhood(shape: tuple[int, ...]) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
    """Steps (26,) to the neighbours in a flattened array, and the parity class (0 to 7) of every voxel.

    Voxels of one class are not neighbours: all that are simple may change at once.
    """
    h, w, d = (np.arange(n, dtype=np.uint8) % 2 for n in shape)
    return _steps(shape), (4 * h[:, None, None] + 2 * w[:, None] + d).ravel()


def _steps(shape: tuple[int, ...]) -> NDArray[np.intp]:
    return _OFFSETS @ np.array([shape[1] * shape[2], shape[2], 1])


def _thin(padded: BoolArray) -> None:
    """Removes, in place, simple voxels that are not line ends, layer by layer from six sides until none is left."""
    flat = padded.ravel()
    around, classes = _neighbourhood(padded.shape)
    removed = True
    while removed:
        removed = False
        for side in around[_FACES]:
            voxels = np.flatnonzero(flat)
            border = voxels[~flat[voxels + side]]
            for parity in range(8):
                chosen = border[classes[border] == parity]
                neighbours = flat[chosen[:, None] + around]
                chosen, neighbours = chosen[neighbours.sum(1) > 1], neighbours[neighbours.sum(1) > 1]
                gone = chosen[_is_simple(neighbours)]
                flat[gone] = False
                removed |= len(gone) > 0


def skeleton(mask: ArrayLike) -> BoolArray:
    """Thins a mask to a one-voxel-wide centre line of the same topology. Ours.

    Not scikit-image's `skeletonize`: of a 3D mask an even number of voxels thick it erases whole branches or all (a bar
    of 2 x 2 x 20 voxels leaves nothing), and coronaries are two voxels wide. Here every removed voxel is simple and no
    line end at the moment it goes.

    Args:
        mask: (H, W, D), non-zero is foreground. May touch the border.

    Returns:
        (H, W, D) bool, a subset of the mask with its Betti numbers. An empty mask stays empty, one voxel stays; a
        cavity keeps a shell around it.

    Raises:
        ValueError: if `mask` is not 3D.
    """
    foreground = as_mask("mask", mask)
    thin = np.zeros_like(foreground)
    if foreground.any():
        box = bounding_box(foreground)
        padded = np.pad(np.ascontiguousarray(foreground[box]), 1)  # its `ravel` must be a view
        _thin(padded)
        thin[box] = padded[1:-1, 1:-1, 1:-1]
    return thin


def grow(seed: ArrayLike, within: ArrayLike) -> BoolArray:
    """Grows a mask inside another without a change of topology, deepest voxels first. Ours.

    Where two fronts would close a handle, a cavity or join two components, a cut one voxel thin stays. Grown from a
    ball, any mask loses its handles this way and little else.

    Args:
        seed: (H, W, D), non-zero is foreground; the part outside `within` is ignored.
        within: (H, W, D), what may be reached.

    Returns:
        (H, W, D) bool, between `seed & within` and `within`, with the Betti numbers of `seed & within`.

    Raises:
        ValueError: if an argument is not 3D or the shapes differ.
    """
    start, limit = as_mask("seed", seed), as_mask("within", within)
    same_shape("seed", start, "within", limit)
    grown = np.zeros_like(limit)
    if not (start & limit).any():
        return grown
    box = bounding_box(limit)
    inside = np.pad(np.ascontiguousarray(limit[box]), 1)  # the `ravel` of the mask must be a view
    mask = inside & np.pad(np.ascontiguousarray(start[box]), 1)
    depth = np.ceil(ndimage.distance_transform_edt(inside)).astype(np.int32)
    flat, level, around, classes = mask.ravel(), depth.ravel(), *_neighbourhood(mask.shape)

    def beside(voxels: NDArray[np.intp]) -> NDArray[np.intp]:
        near = np.unique(voxels[:, None] + around)
        return near[inside.ravel()[near] & ~flat[near]]

    waiting = beside(np.flatnonzero(flat))
    for deepest in range(int(level.max()), 0, -1):
        rim, waiting = waiting[level[waiting] >= deepest], waiting[level[waiting] < deepest]
        while len(rim):
            added = [np.zeros(0, np.intp)]
            for parity in range(8):
                chosen = rim[classes[rim] == parity]
                added.append(chosen[_is_simple(flat[chosen[:, None] + around])])
                flat[added[-1]] = True
            near = beside(np.concatenate(added))  # others are as simple, or not, as they were
            rim, waiting = near[level[near] >= deepest], np.union1d(waiting, near[level[near] < deepest])
        waiting = waiting[~flat[waiting]]
    grown[box] = mask[1:-1, 1:-1, 1:-1]
    return grown


def cl_dice(prediction: ArrayLike, truth: ArrayLike, *, skeletons: tuple[BoolArray, BoolArray] | None = None) -> float:
    """Centre-line Dice with hard skeletons.

    T_prec = |S_P & V_L| / |S_P|, T_sens = |S_L & V_P| / |S_L|, clDice = 2 T_prec T_sens / (T_prec + T_sens), with
    V_P, V_L the two masks and S_P, S_L their skeletons.

    Args:
        prediction: (H, W, D), non-zero is foreground.
        truth: (H, W, D), non-zero is foreground.
        skeletons: of the two, where they are at hand; None computes them.

    Returns:
        A value in [0, 1]; 1 if both masks are empty, 0 if exactly one is.

    Raises:
        ValueError: if an argument is not 3D or the shapes differ.

    References:
        Shit et al., clDice - a novel topology-preserving loss function for tubular structure segmentation, CVPR 2021.
    """
    v_p, v_l = as_mask("prediction", prediction), as_mask("truth", truth)
    same_shape("prediction", v_p, "truth", v_l)
    if not v_p.any() or not v_l.any():
        return float(not v_p.any() and not v_l.any())
    s_p, s_l = skeletons or (skeleton(v_p), skeleton(v_l))
    precision = (s_p & v_l).sum() / s_p.sum()
    sensitivity = (s_l & v_p).sum() / s_l.sum()
    if precision + sensitivity == 0:
        return 0.0
    return float(2 * precision * sensitivity / (precision + sensitivity))


def line_lengths(line: ArrayLike, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> NDArray[np.float64]:
    """Length that each voxel of a centre line stands for: half of every link to its 26 neighbours. Ours.

    Three voxels that are all neighbours at a fork are linked three times, so forks count up to a voxel too much.

    Args:
        line: (H, W, D), non-zero on the line.
        spacing_mm: voxel size along each axis, mm.

    Returns:
        (N,) mm, of the voxels of the line in the order of `volume[line]`; a voxel without neighbours counts as long as
        the smallest side of a voxel.

    Raises:
        ValueError: if `line` is not 3D.
    """
    on = np.pad(as_mask("line", line), 1)
    around = on.ravel()[np.flatnonzero(on)[:, None] + _steps(on.shape)]
    links = around @ np.linalg.norm(_OFFSETS * np.asarray(spacing_mm), axis=1)
    return np.where(links > 0, links / 2, min(spacing_mm))


def centreline_recovered(
    prediction: ArrayLike,
    truth: ArrayLike,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    line: BoolArray | None = None,
) -> float:
    """Share of the length of the true centre line that lies in the predicted mask.

    Args:
        prediction: (H, W, D), non-zero is foreground.
        truth: (H, W, D), non-zero is foreground.
        spacing_mm: voxel size along each axis, mm.
        line: skeleton of the truth, where it is at hand; None computes it.

    Returns:
        A value in [0, 1]; NaN if the truth is empty, 0 if only the prediction is.

    Raises:
        ValueError: if an argument is not 3D or the shapes differ.
    """
    found, wanted = as_mask("prediction", prediction), as_mask("truth", truth)
    same_shape("prediction", found, "truth", wanted)
    voxels = skeleton(wanted) if line is None else line
    lengths = line_lengths(voxels, spacing_mm)
    return float(lengths[found[voxels]].sum() / lengths.sum()) if len(lengths) else float("nan")


def centreline_attached(
    mask: ArrayLike, other: ArrayLike, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0), *, line: BoolArray | None = None
) -> float:
    """Share of the length of a mask's centre line whose component touches another mask.

    Args:
        mask: (H, W, D), for example found coronaries.
        other: (H, W, D), for example the aorta.
        spacing_mm: voxel size along each axis, mm.
        line: skeleton of the mask, where it is at hand; None computes it.

    Returns:
        A value in [0, 1]; NaN if `mask` is empty, 0 if only `other` is.

    Raises:
        ValueError: if an argument is not 3D or the shapes differ.
    """
    attached = attached_part(mask, other)
    voxels = skeleton(mask) if line is None else line
    lengths = line_lengths(voxels, spacing_mm)
    return float(lengths[attached[voxels]].sum() / lengths.sum()) if len(lengths) else float("nan")
