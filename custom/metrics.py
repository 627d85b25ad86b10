"""Layer 1: how good a rendered volume is, measured in the image, given the mask it must show."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from monai.networks import one_hot
from scipy import ndimage
from scipy.stats import wasserstein_distance

from custom.template import label_statistics, noise_sd
from custom.thinning import centreline_attached, centreline_recovered, cl_dice
from custom.topology import betti_errors

_CUBE = np.ones((3, 3, 3), dtype=bool)
_LUNG_BELOW_HU = -300.0
_MIN_VOXELS = 8
_VOXELS = (1.0, 1.0, 1.0)


def label_mean_error(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Mean over labels of |difference of label means| in HU; NaN when none of the labels has 8 voxels."""
    size = max(int(label.max()), *labels) + 1
    means = [label_statistics(torch.from_numpy(v), torch.from_numpy(label), size)[:, 0] for v in (rendered, truth)]
    difference = (means[0] - means[1]).abs()[list(labels)]
    return float(difference.nanmean())


def label_wasserstein(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Mean over labels of the Wasserstein distance between the HU of a label, rendered and true, in HU.

    A shift counts as much as it is, a wrong spread or shape too. NaN when none of the labels has 8 voxels.
    """
    inside = [label == k for k in labels if np.count_nonzero(label == k) >= _MIN_VOXELS]
    distances = [wasserstein_distance(rendered[mask], truth[mask]) for mask in inside]
    return float(np.mean(distances)) if distances else float("nan")


def grain_ratio(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Noise SD inside the labels, rendered over true; NaN when the truth has none."""
    inside = ndimage.binary_erosion(np.isin(label, labels), _CUBE)
    reference = noise_sd(truth, inside)
    return noise_sd(rendered, inside) / reference if reference > 0 else float("nan")


def vessel_regions(
    truth: np.ndarray, label: np.ndarray, labels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the vessels, of the tissue around them, and of where they are searched.

    Around: unlabelled, 2 to 3 voxels away from the vessels, more than a voxel from other labels, and no lung in the
    true image. Searched: the vessels and unlabelled voxels within 2 voxels of them and more than one from other
    labels.
    """
    vessel = np.isin(label, labels)
    free = ~ndimage.binary_dilation((label > 0) & ~vessel, _CUBE) & (label == 0)
    near = ndimage.binary_dilation(vessel, _CUBE)
    around = ndimage.binary_dilation(near, _CUBE, iterations=2) & ~near & free & (truth > _LUNG_BELOW_HU)
    return vessel, around, vessel | (ndimage.binary_dilation(near, _CUBE) & free)


def vessel_contrast_ratio(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Mean of the vessels over that of the tissue around them, rendered over true.

    NaN when either is empty or the true image has no contrast there.
    """
    vessel, around, _ = vessel_regions(truth, label, labels)
    if not vessel.any() or not around.any():
        return float("nan")
    contrasts = [float(image[vessel].mean() - image[around].mean()) for image in (rendered, truth)]
    return contrasts[0] / contrasts[1] if contrasts[1] else float("nan")


def found_vessels(
    rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Masks of the vessels that a threshold finds in the rendered image near those of the label, and of these.

    The threshold lies half-way between the true vessels and the tissue around them. None when either is empty, or the
    true image unknown. The true image itself is not found whole: thin branches vanish in partial volume and noise.
    """
    vessel, around, searched = vessel_regions(truth, label, labels)
    if not vessel.any() or not around.any():
        return None
    threshold = (truth[vessel].mean() + truth[around].mean()) / 2
    return (rendered > threshold) & searched, vessel


def _of_vessels(
    measure: Callable[..., float],
    rendered: np.ndarray,
    truth: np.ndarray,
    label: np.ndarray,
    labels: Sequence[int],
    touches: Sequence[int] = (),
) -> float:
    """A measure of MASK_MEASURES, lengths in voxels, between what `found_vessels` finds and the vessels, or NaN."""
    masks = found_vessels(rendered, truth, label, labels)
    return measure(*masks, np.isin(label, touches), _VOXELS) if masks else float("nan")


def mean_absolute_error(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Mean |difference| in HU over the voxels of the labels (0 is the background); NaN when they are absent."""
    inside = np.isin(label, labels)
    return float(np.abs(rendered[inside] - truth[inside]).mean()) if inside.any() else float("nan")


def texture_correlation(image: np.ndarray, other: np.ndarray, inside: np.ndarray) -> float:
    """Correlation of the fine texture (image minus its Gaussian of one voxel) of two volumes; a test for copying."""
    fine = [(v - ndimage.gaussian_filter(v.astype(np.float32), 1.0))[inside] for v in (image, other)]
    return float(np.corrcoef(*fine)[0, 1])


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

# Rendered and true image, label map and label ids -> value.
MEASURES: dict[str, Callable[..., float]] = {
    measure.__name__: measure
    for measure in (label_mean_error, label_wasserstein, grain_ratio, vessel_contrast_ratio, mean_absolute_error)
} | {f"vessel_{name}": partial(_of_vessels, measure) for name, measure in MASK_MEASURES.items()}


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
    | cl_dice | `custom.thinning.cl_dice` | 0 | 0 | 1 |
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


class RenderingMetric(CumulativeIterationMetric):
    """One measure of rendered volumes, cumulated over cases; the aggregate is the mean over cases where it is defined.

    Args:
        measure: a name of MEASURES.
        labels: label ids it looks at.
        sign: -1 turns an error into a score, for handlers that keep the largest value.
        touches: only for "vessel_attached": ids of labels of the mask that vessels come from, for example the aorta.

    Raises:
        ValueError: on an unknown measure, or `touches` where it is missing or not used.
    """

    def __init__(self, measure: str, labels: Sequence[int], sign: float = 1.0, *, touches: Sequence[int] = ()) -> None:
        super().__init__()
        chosen = _chosen(measure, MEASURES, touches)
        self.measure = partial(chosen, touches=touches) if touches else chosen
        self.labels, self.sign = list(labels), sign

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """(B, 1, H, W, D) rendered HU against (B, 2, H, W, D) true HU and label -> (B, 1)."""
        if y is None or y.shape[1] != 2:
            raise ValueError("y: must be (B, 2, H, W, D), true image and label")
        values = []
        for rendered, truth in zip(y_pred.cpu().float().numpy(), y.cpu().float().numpy(), strict=True):
            values.append(self.measure(rendered[0], truth[0], truth[1].round().astype(np.int64), self.labels))
        return self.sign * torch.tensor(values, dtype=torch.float32)[:, None]

    def aggregate(self) -> torch.Tensor:  # type: ignore[override]
        """Mean over cases, NaN cases left out; scalar."""
        return torch.as_tensor(self.get_buffer()).nanmean()
