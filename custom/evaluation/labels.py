"""How good a label map is, beside the true one: topology, and surfaces in millimetres."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from custom.evaluation.mask_pairs import LINE_MEASURES, MASK_MEASURES, VOXELS, MaskPair, check_measures
from custom.geometry.topology import bounding_box, grown_box
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import CumulativeIterationMetric
from scipy import ndimage

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

    def summary(self, column: str, values: torch.Tensor) -> float:
        """What a column says of all cases and the labels it is asked for: the mean, NaN left out."""
        return float(values.nanmean())

    def details(self) -> dict[str, torch.Tensor]:
        """Column -> (cases, labels)."""
        values = torch.as_tensor(self.get_buffer())
        return {column: values[..., number].contiguous() for number, column in enumerate(self.columns)}

    def aggregate(self) -> dict[str, float]:  # type: ignore[override]
        """Column -> its summary."""
        return {column: self.summary(column, v[:, self.rows_of(column)]) for column, v in self.details().items()}


def _spacing_mm(volume: MetaTensor) -> list[float]:
    """Voxel size along the axes of a volume, also of a batch of one."""
    return affine_to_spacing(volume.peek_pending_affine()).tolist()


class LabelMetric(ColumnMetric):
    """A metric that looks at a label at a time, in the box that holds it in both maps: a scan of 512 x 512 x 275 voxels
    has 3 GB of one-hot channels.

    Args:
        columns: names of the last axis.
        labels: ids, the rows of the buffer.
        touches: ids of labels of the prediction that others should touch.
        spacing_mm: voxel size along each axis, in which lengths are measured; None takes that of the true label map,
            1 when it has no affine.
    """

    needs_affine = False
    """Whether the true label map must be a MetaTensor, whose affine says what lengths are."""

    def __init__(
        self,
        columns: Sequence[str],
        labels: Sequence[int],
        *,
        touches: Sequence[int] = (),
        spacing_mm: Sequence[float] | None = None,
    ) -> None:
        super().__init__(columns)
        self.labels, self.touches, self.spacing_mm = list(labels), list(touches), spacing_mm

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (B, 1, H, W, D), predicted and true -> (B, labels, columns)."""
        if y is None or y.shape != y_pred.shape or y.shape[1] != 1:
            raise ValueError("y: must be label maps (B, 1, H, W, D) of the shape of y_pred")
        if self.needs_affine and not isinstance(y, MetaTensor):
            raise ValueError("y: must be a label map with an affine, in which lengths are known")
        spacing_mm = tuple(self.spacing_mm or (_spacing_mm(y) if isinstance(y, MetaTensor) else VOXELS))
        values = []
        for predicted, true in zip(*map(_label_maps, (y_pred, y)), strict=True):
            diagonal_mm = math.dist([0.0] * 3, [n * s for n, s in zip(true.shape, spacing_mm, strict=True)])
            predicted, true = _heart(predicted, true)
            boxes = [ndimage.find_objects(label_map) for label_map in (predicted, true)]
            rows = []
            for k in self.labels:
                box = _common_box([found[k - 1] for found in boxes if k <= len(found)])
                masks = predicted[box] == k, true[box] == k
                rows.append(self._row(k, MaskPair(*masks, predicted[box], self.touches, spacing_mm, diagonal_mm)))
            values.append(rows)
        shape = (len(values), len(self.labels), len(self.columns))
        return torch.tensor(values, dtype=torch.float32).reshape(shape)  # also of no labels

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        """One value for each column."""
        raise NotImplementedError


def _label_maps(volumes: torch.Tensor) -> np.ndarray:
    """(B, 1, H, W, D) -> (B, H, W, D) of the smallest type that holds the ids."""
    values = torch.as_tensor(volumes).as_subclass(torch.Tensor)[:, 0].cpu().round().numpy()
    return values.astype(np.min_scalar_type(int(values.max(initial=0))), copy=False)


def _heart(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both maps where either holds a label, and the voxels around, in C order: as nibabel reads a file, the last axis
    is the slowest, and all that follows takes three times as long."""
    held = (predicted > 0) | (true > 0)
    box = grown_box(bounding_box(held), [1, 1, 1]) if held.any() else (slice(1),) * 3
    return np.ascontiguousarray(predicted[box]), np.ascontiguousarray(true[box])


def _common_box(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """What holds all boxes and the voxels around, which may be beyond the volume; without any, the first voxel."""
    known = [box for box in boxes if box is not None]
    if not known:
        return (slice(1),) * 3
    return tuple(
        slice(max(min(s.start for s in x) - 1, 0), max(s.stop for s in x) + 1) for x in zip(*known, strict=True)
    )


class TopologyMetric(LabelMetric):
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
        spacing_mm: see :class:`LabelMetric`.

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
        together = list(dict.fromkeys([*labels, *thin_labels]))
        super().__init__(measures, together, touches=touches, spacing_mm=spacing_mm)
        self.asked = {m: list(thin_labels if m in LINE_MEASURES else labels) for m in self.columns}

    def rows_of(self, column: str) -> Sequence[int]:
        """Index of the labels that a column is asked for."""
        return [self.labels.index(k) for k in self.asked[column]]

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        return [MASK_MEASURES[m](pair) if label in self.asked[m] else math.nan for m in self.columns]


class DiceMetric(LabelMetric):
    """Dice of every label but the background, in the column "dice"; NaN of a label that the truth lacks.

    Args:
        num_classes: of the label map, background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(["dice"], range(1, num_classes))

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        return [pair.dice]


class SurfaceMetric(LabelMetric):
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
        super().__init__(["hd95_mm", "nsd"], range(1, num_classes))
        self.tolerance_mm = tolerance_mm

    needs_affine = True

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        here, there = bool(pair.prediction.any()), bool(pair.truth.any())
        if not (here and there):
            return [pair.diagonal_mm if there else math.nan, 0.0 if here or there else math.nan]
        both_ways = [torch.from_numpy(distances) for distances in pair.surface_distances_mm]
        farthest = max(float(torch.quantile(distances, _PERCENTILE / 100)) for distances in both_ways)
        return [farthest, float((torch.cat(both_ways) <= self.tolerance_mm).float().mean())]


class PresenceMetric(LabelMetric):
    """How often a label is there in one map only; the aggregates are counts, not means.

    Columns, 1 or 0 for every label but the background: "missed", the truth has it and the prediction does not, and
    "invented", the other way round.

    Args:
        num_classes: of the label map, background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(["missed", "invented"], range(1, num_classes))

    def summary(self, column: str, values: torch.Tensor) -> float:
        """So often in all cases and labels."""
        return float(values.sum())

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        here, there = bool(pair.prediction.any()), bool(pair.truth.any())
        return [float(there and not here), float(here and not there)]


class LabelMetrics(LabelMetric):
    """Several metrics of labels as one: maps are cropped, labels found and masks cut once for all of them.

    Its columns are theirs, one after the other, its labels all of theirs; a column is NaN of a label that its metric
    does not have. `touches` and `spacing_mm` are those that any of them names.

    Args:
        metrics: each with columns of its own.

    Raises:
        ValueError: when two metrics have a column of one name.
    """

    def __init__(self, metrics: Sequence[LabelMetric]) -> None:
        columns = [column for metric in metrics for column in metric.columns]
        if len(set(columns)) < len(columns):
            raise ValueError(f"metrics: each must have columns of its own, got {columns}")
        super().__init__(
            columns,
            list(dict.fromkeys(k for metric in metrics for k in metric.labels)),
            touches=[k for metric in metrics for k in metric.touches],
            spacing_mm=next((metric.spacing_mm for metric in metrics if metric.spacing_mm), None),
        )
        self.metrics = list(metrics)
        self.needs_affine = any(metric.needs_affine for metric in metrics)
        self.metric_of = {column: metric for metric in metrics for column in metric.columns}

    def rows_of(self, column: str) -> Sequence[int]:
        """Index of the labels that a column is asked for."""
        metric = self.metric_of[column]
        return [self.labels.index(k) for k in np.asarray(metric.labels)[metric.rows_of(column)].tolist()]

    def summary(self, column: str, values: torch.Tensor) -> float:
        """As the metric that a column is of."""
        return self.metric_of[column].summary(column, values)

    def _row(self, label: int, pair: MaskPair) -> list[float]:
        rows = [m._row(label, pair) if label in m.labels else [math.nan] * len(m.columns) for m in self.metrics]
        return [value for row in rows for value in row]
