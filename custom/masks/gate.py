"""What a new label map must keep of its source before it may be written. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from custom.geometry.topology import BoolArray, betti_numbers, bounding_box, components_touching, contact_areas
from custom.masks.preparation import dice
from custom.volumes.anatomy import Label
from custom.volumes.gate import Gate
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["MaskMeasures", "MaskGate", "measure_mask", "rejections", "wall_thickness_mm"]


@dataclass(frozen=True)
class MaskGate(Gate):
    """Limits of acceptance; None switches one off. Betti numbers and attachments are no option: they are always kept.

    Attributes:
        min_det_jacobian: smallest determinant of the Jacobian of the deformation.
        volume_ratio: lowest and highest volume of each label, as a share of its source's. Thin (tubular) labels have
            `vessel_volume_ratio` instead.
        vessel_volume_ratio: the same for tubular labels, as a share of the volume of their carried centre lines.
        wall_thickness_ratio: lowest and highest mean thickness of each wall, as a share of its source's.
        max_dice: highest mean Dice to the source and to each of its neighbours: no copies.
        min_contact_mm2: labels (tubular ones apart) that share at least this area in source or new map must share a
            face in both.
        max_repaired: highest share of a label's voxels that may be changed to bring back its topology.
    """

    min_det_jacobian: float | None = 0.1
    volume_ratio: tuple[float, float] | None = (0.5, 2.0)
    vessel_volume_ratio: tuple[float, float] | None = (0.85, 1.15)
    wall_thickness_ratio: tuple[float, float] | None = (0.6, 1.6)
    max_dice: float | None = 0.98
    min_contact_mm2: float | None = 50.0
    max_repaired: float | None = 0.02


@dataclass(frozen=True)
class MaskMeasures:
    """Measures of a label map that a gate compares; label id -> value.

    Attributes:
        betti: (b0, b1, b2).
        volume_mm3: of the voxels.
        thickness_mm: mean thickness, of walls only.
        contacts_mm2: (low, high) -> shared area.
        loose: tubular label -> labels it must touch -> pieces that do not.
    """

    betti: dict[int, tuple[int, int, int]]
    volume_mm3: dict[int, float]
    thickness_mm: dict[int, float]
    contacts_mm2: dict[tuple[int, int], float]
    loose: dict[int, dict[int, int]]


def wall_thickness_mm(mask: BoolArray, spacing_mm: Sequence[float]) -> float:
    """Mean thickness of a wall, four times the mean depth of its voxels, as of a plate; NaN when empty.

    Depth is measured from voxel centres to the nearest face of a voxel outside: the way to its centre less the half of
    it that lies within that voxel. The depth of the ridge alone would come in steps of a voxel. Walls one voxel thick
    count as two.
    """
    if not mask.any():
        return float("nan")
    box = np.pad(mask[bounding_box(mask)], 1)
    length, nearest = ndimage.distance_transform_edt(box, sampling=spacing_mm, return_indices=True)
    steps = np.abs(nearest - np.indices(box.shape)).max(0)[box]  # voxels along the axis that takes most
    return float(4 * (length[box] * (1 - 0.5 / steps)).mean())


def measure_mask(
    label_map: NDArray[np.uint8], structures: Mapping[int, Label], spacing_mm: Sequence[float]
) -> MaskMeasures:
    """Measures all present structures of a label map (H, W, D)."""
    masks = {k: label_map == k for k in structures}
    voxel = float(np.prod(spacing_mm))
    present = {k: s for k, s in structures.items() if masks[k].any()}
    loose: dict[int, dict[int, int]] = {}
    for k, structure in present.items():
        for other in structure.touches:
            touching, total = components_touching(masks[k], label_map == other)
            loose.setdefault(k, {})[other] = total - touching
    return MaskMeasures(
        betti={k: betti_numbers(masks[k]) for k in present},
        volume_mm3={k: float(masks[k].sum()) * voxel for k in present},
        thickness_mm={k: wall_thickness_mm(masks[k], spacing_mm) for k, s in present.items() if s.wall},
        contacts_mm2=contact_areas(label_map, spacing_mm),
        loose=loose,
    )


def mean_dice(a: NDArray[np.uint8], b: NDArray[np.uint8], labels: Sequence[int]) -> float:
    """Mean Dice over those labels that either map holds; 0 when there is none."""
    scores = [dice(a == k, b == k) for k in labels if (a == k).any() or (b == k).any()]
    return float(np.mean(scores)) if scores else 0.0


def _outside(value: float, limits: tuple[float, float]) -> bool:
    return not limits[0] <= value <= limits[1]


def rejections(
    new: MaskMeasures,
    source: MaskMeasures,
    structures: Mapping[int, Label],
    gate: MaskGate,
    measured: Mapping[str, Any],
) -> list[str]:
    """Every limit that a new label map breaks, with the value and the limit; empty when it may be written.

    Args:
        new, source: measures of the new map and of its prepared source.
        structures: what each label is meant to be.
        gate: the limits.
        measured: "det_jacobian" (smallest), "dice" (highest to any reference), "repaired" {label: share} and
            "vessel_volume_ratio" {label: volume over that of its carried centre lines}.
    """
    broken = []
    for k, wanted in source.betti.items():
        where, found = f"label {k} ({structures[k].name})", new.betti.get(k, (0, 0, 0))
        if found != wanted:
            broken.append(f"betti: {where} has {found}, its source {wanted}")
    for k, others in new.loose.items():
        for other, pieces in others.items():
            if pieces:
                broken.append(
                    f"touches: {pieces} pieces of label {k} ({structures[k].name}) do not touch label {other}"
                )
    if gate.min_det_jacobian is not None and measured["det_jacobian"] < gate.min_det_jacobian:
        broken.append(f"min_det_jacobian: {measured['det_jacobian']:.3f}, at least {gate.min_det_jacobian}")
    if gate.max_dice is not None and measured["dice"] > gate.max_dice:
        broken.append(f"max_dice: {measured['dice']:.3f} to a reference, at most {gate.max_dice}")
    ratios: list[tuple[str, Mapping[int, float], tuple[float, float] | None]] = [
        (
            "volume_ratio",
            {k: new.volume_mm3.get(k, 0.0) / v for k, v in source.volume_mm3.items() if not structures[k].thin},
            gate.volume_ratio,
        ),
        ("vessel_volume_ratio", measured["vessel_volume_ratio"], gate.vessel_volume_ratio),
        (
            "wall_thickness_ratio",
            {k: new.thickness_mm.get(k, 0.0) / v for k, v in source.thickness_mm.items()},
            gate.wall_thickness_ratio,
        ),
    ]
    for name, values, limits in ratios:
        for k, value in values.items():
            if limits is not None and _outside(value, limits):
                broken.append(f"{name}: label {k} ({structures[k].name}) has {value:.2f}, allowed {list(limits)}")
    for k, share in measured["repaired"].items():
        if gate.max_repaired is not None and share > gate.max_repaired:
            broken.append(f"max_repaired: {share:.4f} of label {k} ({structures[k].name}), at most {gate.max_repaired}")
    return broken + _changed_contacts(new, source, structures, gate.min_contact_mm2)


def _changed_contacts(
    new: MaskMeasures, source: MaskMeasures, structures: Mapping[int, Label], min_contact_mm2: float | None
) -> list[str]:
    broken = []
    if min_contact_mm2 is not None:
        for pair in sorted({*new.contacts_mm2, *source.contacts_mm2}):
            if any(structures[k].thin for k in pair):
                continue
            here, there = new.contacts_mm2.get(pair, 0.0), source.contacts_mm2.get(pair, 0.0)
            if min(here, there) == 0 and max(here, there) >= min_contact_mm2:
                names = " and ".join(structures[k].name for k in pair)
                broken.append(f"min_contact_mm2: {names} share {here:.0f} mm2, in the source {there:.0f}")
    return broken
