"""How good one mask is beside the true one, and what its measures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from custom.geometry.centrelines import centreline_attached, centreline_recovered, cl_dice, skeleton
from custom.geometry.surfaces import surface_distances
from custom.geometry.topology import BoolArray, betti_errors
from numpy.typing import NDArray

VOXELS = (1.0, 1.0, 1.0)
"""Spacing that measures lengths in voxels."""


@dataclass(eq=False)
class MaskPair:
    """A predicted mask beside the true one, and what their measures share, computed when first asked for.

    Args:
        prediction, truth: (H, W, D) bool.
        labels: (H, W, D) ids, the label map that the prediction is of; only for `touches`.
        touches: ids in it that the prediction should touch.
        spacing_mm: voxel size along each axis.
        diagonal_mm: of the volume that both are cut from.
    """

    prediction: BoolArray
    truth: BoolArray
    labels: NDArray | None = None
    touches: Sequence[int] = ()
    spacing_mm: Sequence[float] = VOXELS
    diagonal_mm: float = math.nan

    @cached_property
    def dice(self) -> float:
        """Dice; NaN without truth, as MONAI has it."""
        found, wanted = np.count_nonzero(self.prediction), np.count_nonzero(self.truth)
        return 2 * np.count_nonzero(self.prediction & self.truth) / (found + wanted) if wanted else math.nan

    @cached_property
    def surface_distances_mm(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of the surface of the prediction to that of the truth, and the reverse; neither is empty."""
        return surface_distances(self.prediction, self.truth, self.spacing_mm)

    @cached_property
    def betti_errors(self) -> tuple[int, int, int]:
        """Differences of components, tunnels and cavities."""
        return betti_errors(self.prediction, self.truth)

    @cached_property
    def predicted_line(self) -> BoolArray:
        """Skeleton of the prediction."""
        return skeleton(self.prediction)

    @cached_property
    def true_line(self) -> BoolArray:
        """Skeleton of the truth."""
        return skeleton(self.truth)


def _attached(pair: MaskPair) -> float:
    """As `centreline_attached`, but 0 of a mask that is missed: NaN would better the mean."""
    if pair.labels is None or not pair.touches:
        return float("nan")
    if pair.truth.any() and not pair.prediction.any():
        return 0.0
    touched = np.isin(pair.labels, pair.touches)
    return centreline_attached(pair.prediction, touched, pair.spacing_mm, line=pair.predicted_line)


LINE_MEASURES: dict[str, Callable[[MaskPair], float]] = {
    "cl_dice": lambda pair: cl_dice(pair.prediction, pair.truth, skeletons=(pair.predicted_line, pair.true_line)),
    "centreline_recovered": lambda pair: centreline_recovered(
        pair.prediction, pair.truth, pair.spacing_mm, line=pair.true_line
    ),
    "attached": _attached,
}
"""What only thin masks have: centre lines."""

MASK_MEASURES: dict[str, Callable[[MaskPair], float]] = {
    "betti_error_0": lambda pair: float(pair.betti_errors[0]),
    "betti_error_1": lambda pair: float(pair.betti_errors[1]),
    "betti_error_2": lambda pair: float(pair.betti_errors[2]),
    **LINE_MEASURES,
}


def check_measures(measures: Sequence[str], known: Mapping[str, Callable[..., float]]) -> None:
    """Refuses measures that do not exist.

    Raises:
        ValueError: naming the measure and all that exist.
    """
    for measure in measures:
        if measure not in known:
            raise ValueError(f"measures: each must be one of {sorted(known)}, got {measure!r}")
