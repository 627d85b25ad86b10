"""Label maps brought to an intended topology, the ground of every generated mask. Ours.

Real label maps carry voxel noise: specks, pinholes, thin bridges. Signed distances are smoothed, the largest components
kept, cavities filled, and where more handles are left than intended narrow tunnels are filled, too; what remains is
grown again from its deepest voxels, which leaves a cut one voxel thin through each handle. Vessels are not smoothed: a
millimetre would erase them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from custom.geometry.centrelines import grow
from custom.geometry.topology import (
    BoolArray,
    betti_numbers,
    bounding_box,
    components_touching,
    fill_cavities,
    grown_box,
    largest_components,
)
from custom.volumes.anatomy import Label
from custom.volumes.intensity import MIN_VOXELS
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["prepare_label_map"]

LabelMap = NDArray[np.uint8]
_TRUNCATE = 4.0  # standard deviations of a Gaussian, the default of scipy
_BEYOND_MM = 3.0  # ours: farther from a label than that and the Gaussian's reach, another label or background is nearer
_MAX_TUNNEL_MM2 = 40.0  # of a slice: trabeculae and pinholes, not a ring of vessels


def signed_distance(mask: BoolArray, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """Distance in mm to the nearest voxel of the other side, negative inside; infinite for an empty mask."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    if mask.all():
        return np.full(mask.shape, -np.inf)
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    return outside - ndimage.distance_transform_edt(mask, sampling=spacing_mm)


def smooth_label_map(
    label_map: LabelMap, ids: Sequence[int], *, spacing_mm: Sequence[float], sigma_mm: float
) -> LabelMap:
    """Smooths all walls at once: the label (of `ids`, or background) with the lowest blurred signed distance wins.

    Args:
        label_map: (H, W, D); labels that are not in `ids` count as background.
        ids: labels to keep.
        spacing_mm: voxel size along each axis, mm.
        sigma_mm: of the Gaussian that blurs the distances; 0 leaves the labels as they are.

    Returns:
        (H, W, D) uint8.
    """
    sigmas = [sigma_mm / s for s in spacing_mm]
    kept, smooth = np.isin(label_map, ids), np.zeros_like(label_map)
    if not kept.any():
        return smooth
    margins = [int(np.ceil((_BEYOND_MM + _TRUNCATE * sigma_mm) / s)) for s in spacing_mm]
    best = np.full(label_map.shape, -np.inf, np.float32)  # beyond the heart's box it is background
    heart = grown_box(bounding_box(kept), margins)
    best[heart] = ndimage.gaussian_filter(signed_distance(~kept[heart], spacing_mm), sigmas, truncate=_TRUNCATE)
    for label in ids:
        mask = label_map == label
        if mask.any():
            box = grown_box(bounding_box(mask), margins)  # farther away another label or the background is nearer
            distance = ndimage.gaussian_filter(signed_distance(mask[box], spacing_mm), sigmas, truncate=_TRUNCATE)
            ahead = distance < best[box]
            smooth[box][ahead] = label
            best[box][ahead] = distance[ahead]
    return smooth


def _fill_tunnels(mask: BoolArray, free: BoolArray, spacing_mm: Sequence[float]) -> BoolArray:
    """Adds small holes of single slices, in all three planes: a tunnel crosses some slice as one. Grooves stay open."""
    filled = mask.copy()
    for axis in range(3):
        plane = ndimage.generate_binary_structure(3, 1)
        plane[(slice(None),) * axis + ([0, 2],)] = False
        holes = ndimage.label(np.pad(~mask, 1, constant_values=True), plane)[0][1:-1, 1:-1, 1:-1]
        areas = np.bincount(holes.ravel()) * (np.prod(spacing_mm) / spacing_mm[axis])
        small = areas <= _MAX_TUNNEL_MM2
        small[0] = False
        filled |= small[holes] & free
    return filled


def without_handles(mask: BoolArray, free: BoolArray, spacing_mm: Sequence[float], max_handles: int) -> BoolArray:
    """Takes handles out of a mask: tunnels narrow enough are filled, others are cut open, one voxel wide.

    Args:
        mask: (H, W, D).
        free: (H, W, D), voxels that may be added.
        spacing_mm: voxel size along each axis, mm.
        max_handles: with no more than these, nothing is changed.

    Returns:
        (H, W, D) bool of as many components, with at most `max_handles` handles, or none.
    """
    if betti_numbers(mask)[1] <= max_handles:
        return mask
    filled = _fill_tunnels(mask, free, spacing_mm)
    components = betti_numbers(mask)[0]
    filled = fill_cavities(filled) & (filled | free)
    if betti_numbers(filled)[0] != components:
        filled = mask
    if betti_numbers(filled)[1] <= max_handles:
        return filled
    pieces, total = ndimage.label(filled, np.ones((3, 3, 3)))
    depth = ndimage.distance_transform_edt(filled, sampling=spacing_mm)
    seed = np.zeros_like(filled)
    for deepest in ndimage.maximum_position(depth, pieces, range(1, total + 1)):
        seed[deepest] = True
    return grow(seed, filled)


def dice(a: BoolArray, b: BoolArray) -> float:
    """Dice of two masks; 0 when both are empty."""
    return float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))


def prepare_label_map(
    label_map: NDArray[Any], structures: Mapping[int, Label], *, spacing_mm: Sequence[float], smoothing_mm: float = 1.0
) -> tuple[LabelMap, dict[int, dict[str, Any]]]:
    """Cleans a label map towards the intended topology of each label.

    Args:
        label_map: (H, W, D) whole numbers; ids without a structure become background. Labels may touch the border and
            structures may be absent.
        structures: what each label is meant to be.
        spacing_mm: voxel size along each axis, mm.
        smoothing_mm: Gaussian sigma on the signed distances; 0 keeps the walls as they are.

    Returns:
        The prepared map (H, W, D) uint8, and for each present label what changed: "name", "betti_before",
        "betti_after", "voxels_before", "voxels_after" and "dice" of the two.

    Raises:
        ValueError: if the map is not 3D or not of whole numbers, or a label cannot be brought to its intent.
    """
    labels = np.asarray(label_map)
    if labels.ndim != 3:
        raise ValueError(f"label_map must be 3D (H, W, D), got shape {labels.shape}; take one map of one case.")
    if not np.array_equal(labels, np.round(labels)):
        raise ValueError("label_map must hold whole numbers; it looks interpolated: resample labels with 'nearest'.")
    if smoothing_mm < 0:
        raise ValueError(f"smoothing_mm must not be negative, got {smoothing_mm}.")
    present = [k for k in structures if (labels == k).any()]
    if not present:
        raise ValueError(f"label_map holds none of the labels {sorted(structures)}; check the label mapping.")
    for k in present:
        if (voxels := int((labels == k).sum())) < MIN_VOXELS:
            raise ValueError(
                f"label {k} ({structures[k].name}) has {voxels} voxels, at least {MIN_VOXELS} are needed; "
                "drop it with label_mapping, or correct the reference."
            )
    raw = np.where(np.isin(labels, present), labels, 0).astype(np.uint8)
    exact = [k for k in present if structures[k].thin or structures[k].keep]
    smoothed = [k for k in present if k not in exact]
    smooth = raw.copy()
    if smoothing_mm and smoothed:
        smooth = smooth_label_map(raw, smoothed, spacing_mm=spacing_mm, sigma_mm=smoothing_mm)
        smooth[np.isin(raw, exact)] = raw[np.isin(raw, exact)]
    cleaned = [k for k in present if not structures[k].keep]
    prepared = np.where(np.isin(smooth, cleaned), 0, smooth)
    for k in cleaned:
        prepared[largest_components(smooth == k, structures[k].components)] = k
    for k in sorted(cleaned, key=lambda k: structures[k].thin):
        mask = prepared == k
        mask = fill_cavities(mask) & (mask | (prepared == 0))
        prepared[prepared == k] = 0
        prepared[without_handles(mask, prepared == 0, spacing_mm, structures[k].handles)] = k
    report = {}
    for k in present:
        before, after = raw == k, prepared == k
        report[k] = {
            "name": structures[k].name,
            "betti_before": betti_numbers(before),
            "betti_after": betti_numbers(after),
            "voxels_before": int(before.sum()),
            "voxels_after": int(after.sum()),
            "dice": dice(before, after),
        }
    _check_intent(prepared, {k: structures[k] for k in cleaned})
    return prepared, report


def _check_intent(prepared: LabelMap, structures: Mapping[int, Label]) -> None:
    for k, structure in structures.items():
        where = f"label {k} ({structure.name})"
        components, handles, cavities = betti_numbers(prepared == k)
        if components != structure.components:
            raise ValueError(
                f"{where} has {components} components, {structure.components} are intended; correct the reference, or "
                f"change the structure for all references: components={components}, or keep=true to take it as it is "
                f"(--anatomy#{k}#components {components}, --anatomy#{k}#keep True)."
            )
        if cavities or handles > structure.handles:
            raise ValueError(
                f"{where} keeps {handles} handles and {cavities} cavities (at most {structure.handles} and 0); "
                "another label lies inside it: correct the reference, drop one of the two labels, or keep it as it is "
                f"with keep=true (--anatomy#{k}#keep True)."
            )
        for other in structure.touches:
            touching, total = components_touching(prepared == k, prepared == other)
            if touching < total:
                raise ValueError(
                    f"{where}: {touching} of {total} components touch label {other}, all must; correct the reference, "
                    f"lower smoothing_mm, or take {other} out of touches (--anatomy#{k}#touches "
                    f'"{[j for j in structure.touches if j != other]}").'
                )
