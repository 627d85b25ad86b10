"""How good one mask is beside the true one, and what its measures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from custom.geometry.centrelines import centreline_attached, centreline_recovered, cl_dice, skeleton
from custom.geometry.topology import BoolArray, betti_errors

VOXELS = (1.0, 1.0, 1.0)
"""Spacing that measures lengths in voxels."""


@dataclass(eq=False)
class MaskPair:
    """A predicted mask beside the true one, and what their measures share, computed when first asked for.

    Args:
        prediction, truth: (H, W, D) bool.
        touched: (H, W, D) bool, what the prediction should touch.
        spacing_mm: voxel size along each axis.
        diagonal_mm: of the volume that both are cut from.
    """

    prediction: BoolArray
    truth: BoolArray
    touched: BoolArray | None = None
    spacing_mm: Sequence[float] = VOXELS
    diagonal_mm: float = math.nan

    @property
    def channels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and truth as MONAI's metrics take one class, (1, 1, H, W, D)."""
        found, wanted = (torch.from_numpy(mask)[None, None] for mask in (self.prediction, self.truth))
        return found, wanted

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
    if pair.touched is None:
        return float("nan")
    if pair.truth.any() and not pair.prediction.any():
        return 0.0
    return centreline_attached(pair.prediction, pair.touched, pair.spacing_mm, line=pair.predicted_line)


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
