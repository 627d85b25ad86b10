"""Labels of the cardiac CT phantom and the topology they must have."""

from __future__ import annotations

import numpy as np
from custom.geometry.topology import betti_numbers, fill_cavities, largest_components
from custom.phantom.geometry import Array
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["INTENDED_BETTI", "LABELS", "Betti", "TopologyError", "label_map"]

LABELS: dict[str, int] = {
    "myocardium": 1,
    "left_atrium": 2,
    "left_ventricle": 3,
    "right_atrium": 4,
    "right_ventricle": 5,
    "aorta": 6,
    "pulmonary_artery": 7,
    "appendage": 8,
    "coronaries": 9,
    "pulmonary_veins": 10,
}
"""Label ids of the public cardiac-CT numbering."""

Betti = tuple[int, int, int]
INTENDED_BETTI: dict[int, Betti] = {k: (1, 0, 0) for k in range(1, 9)} | {9: (2, 0, 0), 10: (4, 0, 0)}
"""(b0, b1, b2) of every label: balls, a left and a right coronary tree, four pulmonary veins."""


class TopologyError(RuntimeError):
    """The drawn geometry does not have the intended topology; draw another one."""


def _enforce(mask: NDArray[np.bool_], k: int, wanted: Betti) -> NDArray[np.bool_]:
    """Largest components, filled, handles closed by a small opening or closing; TopologyError if that is not enough."""
    cross = ndimage.generate_binary_structure(3, 1)
    for repair in (lambda m: m, lambda m: ndimage.binary_opening(m, cross), lambda m: ndimage.binary_closing(m, cross)):
        candidate = fill_cavities(largest_components(repair(mask), wanted[0]))
        if betti_numbers(candidate) == wanted:
            return candidate
    raise TopologyError(f"label {k} has Betti numbers {betti_numbers(candidate)}, intended {wanted}")


def label_map(
    distances: dict[str, Array], coronaries: NDArray[np.bool_], intended: dict[int, Betti] = INTENDED_BETTI
) -> NDArray[np.uint8]:
    """Labels voxels inside (distance <= 0), the first label winning; TopologyError if the topology is not intended."""
    label = np.zeros(coronaries.shape, np.uint8)
    for name, distance in distances.items():
        k = LABELS[name]
        label[_enforce((distance <= 0) & ~coronaries & (label == 0), k, intended[k])] = k
    label[coronaries] = LABELS["coronaries"]
    for k, wanted in intended.items():
        if (found := betti_numbers(label == k)) != wanted:
            raise TopologyError(f"label {k} has Betti numbers {found}, intended {wanted}")
    return label
