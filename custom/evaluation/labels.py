"""How good a label map is, beside the true one: topology, and surfaces in millimetres."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from monai.networks import one_hot

from custom.geometry.centrelines import centreline_attached, centreline_recovered, cl_dice
from custom.geometry.topology import betti_errors

_VOXELS = (1.0, 1.0, 1.0)

Spacing = Sequence[float]

# Masks, predicted and true, mask of what the first should touch, and spacing in mm -> value.
MASK_MEASURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Spacing], float]] = {
    "betti_error_0": lambda prediction, truth, *_: float(betti_errors(prediction, truth)[0]),
    "betti_error_1": lambda prediction, truth, *_: float(betti_errors(prediction, truth)[1]),
    "betti_error_2": lambda prediction, truth, *_: float(betti_errors(prediction, truth)[2]),
    "cl_dice": lambda prediction, truth, *_: cl_dice(prediction, truth),
    "centreline_recovered": lambda prediction, truth, _, spacing_mm: centreline_recovered(
        prediction, truth, spacing_mm
    ),
    "attached": lambda prediction, _, other, spacing_mm: centreline_attached(prediction, other, spacing_mm),
}

NEEDS_TOUCHES = ("attached", "vessel_attached")


def _chosen(measure: str, known: Mapping[str, Callable[..., float]], touches: Sequence[int]) -> Callable[..., float]:
    """The measure of a name.

    Raises:
        ValueError: on an unknown one, or when labels to touch are given to a measure without, or the other way round.
    """
    if measure not in known:
        raise ValueError(f"measure: must be one of {sorted(known)}, got {measure!r}")
    if bool(touches) != (measure in NEEDS_TOUCHES):
        raise ValueError(
            f"touches: {measure!r} needs {'the' if measure in NEEDS_TOUCHES else 'no'} ids of labels to touch, "
            f"got {list(touches)}"
        )
    return known[measure]


def _spacing_mm(volume: MetaTensor) -> list[float]:
    """Voxel size along the axes of a volume, also of a batch of one."""
    return affine_to_spacing(volume.peek_pending_affine()).tolist()


class TopologyMetric(CumulativeIterationMetric):
    """One topological measure of labels of label maps, cumulated over cases; the aggregate is the mean over all.

    | measure | of a case | prediction empty | truth empty | both |
    |---|---|---|---|---|
    | betti_error_0, _1, _2 | difference of components, tunnels, cavities | Betti number of the other | | 0 |
    | cl_dice | `custom.geometry.centrelines.cl_dice` | 0 | 0 | 1 |
    | centreline_recovered | share of the length of the true centre line that lies in the prediction | 0 | NaN | NaN |
    | attached | share of the length of the predicted centre line in components that touch `touches` | NaN | | NaN |

    Args:
        measure: a name of MASK_MEASURES.
        labels: id, or ids, whose masks are compared.
        touches: only for "attached": ids of labels of the prediction, for example the aorta.
        spacing_mm: voxel size along each axis, in which lengths are measured; None takes that of the true label map,
            1 when it has no affine.

    Raises:
        ValueError: on an unknown measure, or `touches` where it is missing or not used.
    """

    def __init__(
        self,
        measure: str,
        labels: int | Sequence[int],
        *,
        touches: Sequence[int] = (),
        spacing_mm: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.measure = _chosen(measure, MASK_MEASURES, touches)
        self.labels = [labels] if isinstance(labels, int) else list(labels)
        self.touches, self.spacing_mm = list(touches), spacing_mm

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (B, 1, H, W, D), predicted and true -> (B, labels)."""
        if y is None or y.shape != y_pred.shape or y.shape[1] != 1:
            raise ValueError("y: must be label maps (B, 1, H, W, D) of the shape of y_pred")
        spacing_mm = tuple(self.spacing_mm or (_spacing_mm(y) if isinstance(y, MetaTensor) else _VOXELS))
        maps = [torch.as_tensor(volume[:, 0]).cpu().round().numpy() for volume in (y_pred, y)]
        values = []
        for predicted, true in zip(*maps, strict=True):
            other = np.isin(predicted, self.touches)
            values.append([self.measure(predicted == k, true == k, other, spacing_mm) for k in self.labels])
        return torch.tensor(values, dtype=torch.float32)

    def aggregate(self) -> torch.Tensor:  # type: ignore[override]
        """Mean over cases and labels, NaN left out; scalar."""
        return torch.as_tensor(self.get_buffer()).nanmean()


class MillimetreMetric(CumulativeIterationMetric):
    """A surface metric of MONAI on label maps, in mm: MONAI's handlers do not hand the voxel size of a case on.

    Args:
        metric: `HausdorffDistanceMetric` or `SurfaceDiceMetric` without background.
        num_classes: of the label map, background included.

    The aggregate is the mean over cases and labels where it is defined. A label that both maps lack is NaN; one that
    a single map lacks has no distance (NaN), and a surface Dice of 0.
    """

    def __init__(self, metric: HausdorffDistanceMetric | SurfaceDiceMetric, num_classes: int) -> None:
        super().__init__()
        self.metric, self.num_classes = metric, num_classes

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (1, 1, H, W, D), the true one a MetaTensor with its affine -> (1, labels)."""
        if not isinstance(y, MetaTensor) or y.shape != y_pred.shape or y.shape[:2] != (1, 1):
            raise ValueError("y: must be a label map (1, 1, H, W, D) with an affine, of the shape of y_pred")
        spacing_mm = _spacing_mm(y)
        masks = [one_hot(torch.as_tensor(v).round(), self.num_classes) for v in (y_pred, y)]
        with warnings.catch_warnings():  # a label without a surface is NaN here, said in the docstring
            warnings.filterwarnings("ignore", message=".*may result in nan/inf distance", category=UserWarning)
            values = torch.as_tensor(self.metric(*masks, spacing=spacing_mm)).float()
        self.metric.reset()
        return torch.where(values.isfinite(), values, torch.nan)

    def aggregate(self) -> torch.Tensor:  # type: ignore[override]
        """Mean over cases and labels, NaN left out; scalar."""
        return torch.as_tensor(self.get_buffer()).nanmean()
