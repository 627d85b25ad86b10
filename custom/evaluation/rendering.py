"""How good a rendered volume is, measured in the image, given the mask it must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric
from scipy import ndimage
from scipy.stats import wasserstein_distance

from custom.evaluation.labels import _VOXELS, MASK_MEASURES, _chosen
from custom.volumes.intensity import MIN_VOXELS, label_statistics, noise_sd

_CUBE = np.ones((3, 3, 3), dtype=bool)
_LUNG_BELOW_HU = -300.0


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
    inside = [label == k for k in labels if np.count_nonzero(label == k) >= MIN_VOXELS]
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


# Rendered and true image, label map and label ids -> value.
MEASURES: dict[str, Callable[..., float]] = {
    measure.__name__: measure
    for measure in (label_mean_error, label_wasserstein, grain_ratio, vessel_contrast_ratio, mean_absolute_error)
} | {f"vessel_{name}": partial(_of_vessels, measure) for name, measure in MASK_MEASURES.items()}


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
