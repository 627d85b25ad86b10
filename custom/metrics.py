"""Layer 1: how good a rendered volume is, measured in the image, given the mask it must show."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from monai.networks import one_hot
from scipy import ndimage

from custom.template import label_statistics, noise_sd
from custom.thinning import cl_dice
from custom.topology import betti_errors

_CUBE = np.ones((3, 3, 3), dtype=bool)
_LUNG_BELOW_HU = -300.0


def label_mean_error(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Mean over labels of |difference of label means| in HU; NaN when none of the labels has 8 voxels."""
    size = max(int(label.max()), *labels) + 1
    means = [label_statistics(torch.from_numpy(v), torch.from_numpy(label), size)[:, 0] for v in (rendered, truth)]
    difference = (means[0] - means[1]).abs()[list(labels)]
    return float(difference.nanmean())


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


def vessel_cl_dice(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """clDice between the vessel mask and what a threshold finds in the rendered image.

    The threshold lies half-way between the true vessels and the tissue around them. NaN when either is empty. The
    true image itself does not reach 1: thin branches vanish in partial volume and noise.
    """
    vessel, around, searched = vessel_regions(truth, label, labels)
    if not vessel.any() or not around.any():
        return float("nan")
    threshold = (truth[vessel].mean() + truth[around].mean()) / 2
    return cl_dice((rendered > threshold) & searched, vessel)


def mean_absolute_error(rendered: np.ndarray, truth: np.ndarray, label: np.ndarray, labels: Sequence[int]) -> float:
    """Mean |difference| in HU over the voxels of the labels (0 is the background); NaN when they are absent."""
    inside = np.isin(label, labels)
    return float(np.abs(rendered[inside] - truth[inside]).mean()) if inside.any() else float("nan")


def texture_correlation(image: np.ndarray, other: np.ndarray, inside: np.ndarray) -> float:
    """Correlation of the fine texture (image minus its Gaussian of one voxel) of two volumes; a test for copying."""
    fine = [(v - ndimage.gaussian_filter(v.astype(np.float32), 1.0))[inside] for v in (image, other)]
    return float(np.corrcoef(*fine)[0, 1])


MEASURES = {
    measure.__name__: measure
    for measure in (
        label_mean_error,
        grain_ratio,
        vessel_contrast_ratio,
        vessel_cl_dice,
        mean_absolute_error,
    )
}


MASK_MEASURES = {
    "betti_error_0": lambda prediction, truth: float(betti_errors(prediction, truth)[0]),
    "betti_error_1": lambda prediction, truth: float(betti_errors(prediction, truth)[1]),
    "betti_error_2": lambda prediction, truth: float(betti_errors(prediction, truth)[2]),
    "cl_dice": cl_dice,
}


class TopologyMetric(CumulativeIterationMetric):
    """One topological measure of labels of label maps, cumulated over cases; the aggregate is the mean over all.

    Args:
        measure: a name of MASK_MEASURES.
        labels: id, or ids, whose masks are compared.

    Raises:
        ValueError: on an unknown measure.
    """

    def __init__(self, measure: str, labels: int | Sequence[int]) -> None:
        super().__init__()
        if measure not in MASK_MEASURES:
            raise ValueError(f"measure: must be one of {sorted(MASK_MEASURES)}, got {measure!r}")
        self.measure, self.labels = MASK_MEASURES[measure], [labels] if isinstance(labels, int) else list(labels)

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (B, 1, H, W, D), predicted and true -> (B, labels)."""
        if y is None or y.shape != y_pred.shape or y.shape[1] != 1:
            raise ValueError("y: must be label maps (B, 1, H, W, D) of the shape of y_pred")
        maps = [torch.as_tensor(volume[:, 0]).cpu().round().numpy() for volume in (y_pred, y)]
        values = [[self.measure(p == k, t == k) for k in self.labels] for p, t in zip(*maps, strict=True)]
        return torch.tensor(values, dtype=torch.float32)

    def aggregate(self) -> torch.Tensor:  # type: ignore[override]
        """Mean over cases and labels; scalar."""
        return torch.as_tensor(self.get_buffer()).mean()


class MillimetreMetric(CumulativeIterationMetric):
    """A surface metric of MONAI on label maps, in mm: MONAI's handlers do not hand the voxel size of a case on.

    Args:
        metric: `HausdorffDistanceMetric` or `SurfaceDiceMetric` without background.
        num_classes: of the label map, background included.

    The aggregate is the mean over cases and labels where it is defined: a label that prediction or truth lacks has no
    surface and counts as NaN; its Dice tells.
    """

    def __init__(self, metric: HausdorffDistanceMetric | SurfaceDiceMetric, num_classes: int) -> None:
        super().__init__()
        self.metric, self.num_classes = metric, num_classes

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Label maps (1, 1, H, W, D), the true one a MetaTensor with its affine -> (1, labels)."""
        if not isinstance(y, MetaTensor) or y.shape != y_pred.shape or y.shape[:2] != (1, 1):
            raise ValueError("y: must be a label map (1, 1, H, W, D) with an affine, of the shape of y_pred")
        spacing_mm = affine_to_spacing(y.peek_pending_affine()).tolist()
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

    Raises:
        ValueError: on an unknown measure.
    """

    def __init__(self, measure: str, labels: Sequence[int], sign: float = 1.0) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure: must be one of {sorted(MEASURES)}, got {measure!r}")
        self.measure, self.labels, self.sign = MEASURES[measure], list(labels), sign

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
