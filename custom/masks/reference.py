"""A prepared label map, ready to be deformed again and again. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from custom.geometry.registration import align_label_map, velocity_weights
from custom.geometry.topology import BoolArray, bounding_box, grown_box
from custom.geometry.vessels import VesselTree, anchored, read_tree, tree_volume_mm3
from custom.masks.gate import MaskMeasures, measure_mask
from custom.masks.preparation import LabelMap, signed_distance
from custom.volumes.anatomy import Label
from scipy import ndimage

__all__ = ["Neighbour", "Reference", "fill_nearest", "register_neighbour"]

_REACH_MM = 12.0  # signed distances are exact so far from a label, and at least this farther away


@dataclass(frozen=True)
class Neighbour:
    """Another reference as seen from a source.

    Attributes:
        label_map: (H, W, D), aligned with the source by position and extent, on its grid.
        weights: (3, nodes) of the velocity that takes the source onto it.
    """

    label_map: LabelMap
    weights: torch.Tensor


def _tensor(label_map: LabelMap) -> torch.Tensor:
    return torch.from_numpy(label_map.astype(np.int64))[None, None]


def _walls(structures: Mapping[int, Label]) -> list[int]:
    return [k for k, s in structures.items() if not s.thin]


def register_neighbour(
    source: LabelMap, other: LabelMap, structures: Mapping[int, Label], spacing_mm: Sequence[float]
) -> Neighbour:
    """Aligns another reference with a source and registers the source to it; both (H, W, D) of one spacing.

    Raises:
        ValueError: when they share no label that is not tubular.
    """
    labels = _walls(structures)
    if not any((source == k).any() and (other == k).any() for k in labels):
        raise ValueError(
            "a reference and its neighbour must share a label that is not thin, by which one is registered to the "
            "other, and share none; set --neighbours 0, and each mask is made from one reference alone"
        )
    aligned = align_label_map(_tensor(other), _tensor(source), labels=labels)
    weights = velocity_weights(_tensor(source), aligned, labels=labels, spacing_mm=spacing_mm)
    return Neighbour(aligned[0, 0].numpy().astype(np.uint8), weights[0])


class Reference:
    """A prepared label map, ready to be deformed again and again.

    Args:
        label_map: (H, W, D), prepared: what it holds of `structures` is the topology that every new mask keeps.
        structures: what each label is meant to be.
        spacing_mm: voxel size along each axis, mm.

    Raises:
        ValueError: when a tubular label is no forest (handles, cavities, no length), a label that must be
            touched is absent, or the map is a single slice.
    """

    def __init__(self, label_map: LabelMap, structures: Mapping[int, Label], *, spacing_mm: Sequence[float]) -> None:
        if min(label_map.shape) < 2:
            raise ValueError(f"label_map must have two voxels along each axis, got {label_map.shape}; use a volume.")
        self.label_map, self.spacing_mm = label_map, [float(s) for s in spacing_mm]
        self.structures = {k: s for k, s in structures.items() if (label_map == k).any()}
        self.anatomy: MaskMeasures = measure_mask(label_map, self.structures, self.spacing_mm)
        self.vessels = [k for k, s in self.structures.items() if s.thin]
        self.walls = _walls(self.structures)
        for k, structure in self.structures.items():
            absent = [other for other in structure.touches if not (label_map == other).any()]
            if absent:
                raise ValueError(
                    f"label {k} ({structure.name}) must touch {absent}, which the map does not hold; correct the "
                    "reference, or take it out of touches."
                )
        for k in self.vessels:
            if self.anatomy.betti[k][1:] != (0, 0):
                raise ValueError(
                    f"label {k} ({structures[k].name}) has Betti numbers {self.anatomy.betti[k]}; a vessel is drawn "
                    "as a tree without handles or cavities: prepare it with handles=0 and keep=false."
                )
        self.trees = {k: self._tree(k) for k in self.vessels}
        # voxels over cones: cones leave round ends out and count forks twice
        self.cone_shares = {k: self.anatomy.volume_mm3[k] / tree_volume_mm3(tree) for k, tree in self.trees.items()}
        filled = fill_nearest(label_map, np.isin(label_map, self.vessels))
        self.distances = torch.stack([_distance_near(filled == k, self.spacing_mm) for k in [0, *self.walls]])[None]

    def _tree(self, k: int) -> VesselTree:
        tree = read_tree(self.label_map == k, self.spacing_mm)
        for other in self.structures[k].touches:
            tree = anchored(tree, self.label_map == other, self.spacing_mm)
        if tree_volume_mm3(tree) == 0:
            raise ValueError(
                f"label {k} ({self.structures[k].name}) has no length, as every vessel has; correct the reference, "
                "or set thin=false."
            )
        if self.structures[k].touches:
            return tree
        number = tree.trees()
        widest = [np.flatnonzero(number == t)[tree.radii_mm[number == t].argmax()] for t in range(number.max() + 1)]
        return VesselTree(tree.points_mm, tree.radii_mm, tree.edges, np.array(widest, np.intp))


def fill_nearest(label_map: LabelMap, removed: BoolArray) -> LabelMap:
    """Fills voxels by the nearest label (or background) that stays."""
    filled = label_map.copy()
    if removed.any() and not removed.all():
        box = grown_box(bounding_box(removed), [3, 3, 3])
        nearest = ndimage.distance_transform_edt(removed[box], return_distances=False, return_indices=True)
        filled[box] = label_map[box][tuple(nearest)]
    return filled


def _distance_near(mask: BoolArray, spacing_mm: Sequence[float]) -> torch.Tensor:
    """Signed distance in mm, exact near the mask; beyond `_REACH_MM` of its bounding box a lower bound of it."""
    if not mask.any():
        return torch.full(mask.shape, _REACH_MM)
    margins = [int(np.ceil(_REACH_MM / s)) for s in spacing_mm]
    box = grown_box(bounding_box(mask), margins)
    distance = np.full(mask.shape, _REACH_MM, np.float32)
    distance[box] = signed_distance(mask[box], spacing_mm)
    return torch.from_numpy(distance)
