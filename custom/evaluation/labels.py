"""How good a label map is, beside the true one: topology, and surfaces in millimetres."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from custom.geometry.centrelines import centreline_attached, centreline_recovered, cl_dice, skeleton
from custom.geometry.topology import BoolArray, betti_errors
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import CumulativeIterationMetric, compute_hausdorff_distance, compute_surface_dice
from monai.networks import one_hot

VOXELS = (1.0, 1.0, 1.0)
"""Spacing that measures lengths in voxels."""
_PERCENTILE = 95  # of surface distances, as usual: a single stray voxel decides the maximum (Taha & Hanbury 2015)


class ColumnMetric(CumulativeIterationMetric):
    """Several measures of each case at once, which may share what they compute.

    Cumulates (cases, labels, columns), NaN where a column is not defined or not asked for a label.

    Args:
        columns: names of the last axis.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        super().__init__()
        self.columns = list(columns)

    def rows_of(self, column: str) -> Sequence[int] | slice:
        """Index of the labels that a column is asked for."""
        return slice(None)

    def details(self) -> dict[str, torch.Tensor]:
        """Column -> (cases, labels)."""
        values = torch.as_tensor(self.get_buffer())
        return {column: values[..., number].contiguous() for number, column in enumerate(self.columns)}

    def aggregate(self) -> dict[str, float]:  # type: ignore[override]
        """Column -> mean over cases and the labels it is asked for, NaN left out."""
        return {column: float(v[:, self.rows_of(column)].nanmean()) for column, v in self.details().items()}


@dataclass(eq=False)
class MaskPair:
    """A predicted mask beside the true one, and what their measures share, computed when first asked for.

    Args:
        prediction, truth: (H, W, D) bool.
        touched: (H, W, D) bool, what the prediction should touch.
        spacing_mm: voxel size along each axis.
    """

    prediction: BoolArray
    truth: BoolArray
    touched: BoolArray | None = None
    spacing_mm: Sequence[float] = VOXELS

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


def _spacing_mm(volume: MetaTensor) -> list[float]:
    """Voxel size along the axes of a volume, also of a batch of one."""
    return affine_to_spacing(volume.peek_pending_affine()).tolist()


class TopologyMetric(ColumnMetric):
    """Topological measures of labels of label maps, a column each; Betti numbers and skeletons are computed once.

    | column | of a case | prediction empty | truth empty | both |
    |---|---|---|---|---|
    | betti_error_0, _1, _2 | difference of components, tunnels, cavities | Betti number of the other | | 0 |
    | cl_dice | `custom.geometry.centrelines.cl_dice` | 0 | 0 | 1 |
    | centreline_recovered | share of the length of the true centre line that lies in the prediction | 0 | NaN | NaN |
    | attached | share of the length of the predicted centre line in components that touch `touches` | 0 | | NaN |

    Args:
        measures: names of the columns, of MASK_MEASURES.
        labels: ids whose Betti numbers are compared.
        thin_labels: ids whose centre lines are compared. The labels of the buffer are `labels` and then those of
            these that are not among them.
        touches: for "attached": ids of labels of the prediction, for example the aorta; without any it is NaN.
        spacing_mm: voxel size along each axis, in which lengths are measured; None takes that of the true label map,
            1 when it has no affine.

    Raises:
        ValueError: on an unknown measure.
    """

    def __init__(
        self,
        measures: Sequence[str],
        *,
        labels: Sequence[int] = (),
        thin_labels: Sequence[int] = (),
        touches: Sequence[int] = (),
        spacing_mm: Sequence[float] | None = None,
    ) -> None:
        check_measures(measures, MASK_MEASURES)
        super().__init__(measures)
        self.labels = list(dict.fromkeys([*labels, *thin_labels]))
        self.asked = {m: list(thin_labels if m in LINE_MEASURES else labels) for m in self.columns}
        self.touches, self.spacing_mm = list(touches), spacing_mm

    def rows_of(self, column: str) -> Sequence[int]:
        """Index of the labels that a column is asked for."""
        return [self.labels.index(k) for k in self.asked[column]]

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (B, 1, H, W, D), predicted and true -> (B, labels, columns)."""
        if y is None or y.shape != y_pred.shape or y.shape[1] != 1:
            raise ValueError("y: must be label maps (B, 1, H, W, D) of the shape of y_pred")
        spacing_mm = tuple(self.spacing_mm or (_spacing_mm(y) if isinstance(y, MetaTensor) else VOXELS))
        maps = [torch.as_tensor(volume[:, 0]).cpu().round().numpy() for volume in (y_pred, y)]
        values = []
        for predicted, true in zip(*maps, strict=True):
            touched = np.isin(predicted, self.touches) if self.touches else None
            values.append([self._row(k, MaskPair(predicted == k, true == k, touched, spacing_mm)) for k in self.labels])
        shape = (len(values), len(self.labels), len(self.columns))
        return torch.tensor(values, dtype=torch.float32).reshape(shape)  # also of no labels

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        return [MASK_MEASURES[m](pair) if label in self.asked[m] else float("nan") for m in self.columns]


class SurfaceMetric(ColumnMetric):
    """MONAI's surface metrics on label maps, in mm: its handlers do not hand the voxel size of a case on.

    Columns: "hd95_mm", the 95th percentile of the Hausdorff distance, and "nsd", the normalised surface Dice; both of
    every label but the background. A label that both maps lack is NaN; one that a single map lacks has a surface Dice
    of 0. One that the prediction misses is as far off as the volume allows, the length of its diagonal, as in BraTS:
    else a label would better the mean by being missed. One that only the prediction has has no distance (NaN).

    Args:
        num_classes: of the label map, background included.
        tolerance_mm: surfaces that are so near count as found by "nsd".

    References:
        Nikolov et al., Clinically applicable segmentation of head and neck anatomy, JMIR 2021 (surface Dice).
    """

    def __init__(self, num_classes: int, *, tolerance_mm: float) -> None:
        super().__init__(["hd95_mm", "nsd"])
        self.num_classes, self.tolerance_mm = num_classes, tolerance_mm

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (1, 1, H, W, D), the true one a MetaTensor with its affine -> (1, labels, 2)."""
        if not isinstance(y, MetaTensor) or y.shape != y_pred.shape or y.shape[:2] != (1, 1):
            raise ValueError("y: must be a label map (1, 1, H, W, D) with an affine, of the shape of y_pred")
        found, wanted = (one_hot(torch.as_tensor(v).round(), self.num_classes) for v in (y_pred, y))
        spacing_mm, tolerances = _spacing_mm(y), [self.tolerance_mm] * (self.num_classes - 1)
        with warnings.catch_warnings():  # a label without a surface is NaN here, said in the docstring
            warnings.filterwarnings("ignore", message=".*may result in nan/inf distance", category=UserWarning)
            values = [
                compute_hausdorff_distance(found, wanted, percentile=_PERCENTILE, spacing=spacing_mm),
                compute_surface_dice(found, wanted, tolerances, spacing=spacing_mm),
            ]
        columns = torch.stack([v.float().cpu() for v in values], -1)
        columns = torch.where(columns.isfinite(), columns, torch.nan)
        here, there = (v[:, 1:].flatten(2).any(2).cpu() for v in (found, wanted))
        columns[..., 0][there & ~here] = math.dist(
            [0.0] * 3, [n * s for n, s in zip(y.shape[2:], spacing_mm, strict=True)]
        )
        return columns


class PresenceMetric(ColumnMetric):
    """How often a label is there in one map only; the aggregates are counts, not means.

    Columns, 1 or 0 for every label but the background: "missed", the truth has it and the prediction does not, and
    "invented", the other way round.

    Args:
        num_classes: of the label map, background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(["missed", "invented"])
        self.num_classes = num_classes

    def aggregate(self) -> dict[str, float]:  # type: ignore[override]
        """Column -> so often in all cases and labels."""
        return {column: float(values.sum()) for column, values in self.details().items()}

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (B, 1, H, W, D), predicted and true -> (B, labels, 2)."""
        if y is None or y.shape != y_pred.shape or y.shape[1] != 1:
            raise ValueError("y: must be label maps (B, 1, H, W, D) of the shape of y_pred")
        ids = torch.arange(1, self.num_classes)
        maps = [torch.as_tensor(volume).as_subclass(torch.Tensor).cpu().round().flatten(1) for volume in (y_pred, y)]
        here, there = (torch.stack([torch.isin(ids, row) for row in volume]) for volume in maps)
        return torch.stack([there & ~here, here & ~there], -1).float()
