"""How good a rendered volume is, measured in the image, given the mask it must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from custom.evaluation.labels import ColumnMetric
from custom.evaluation.mask_pairs import MASK_MEASURES, MaskPair, check_measures
from custom.geometry.topology import BoolArray, bounding_box
from custom.volumes.intensity import LUNG_BELOW_HU, MIN_VOXELS, label_statistics, noise_sd
from scipy import ndimage
from scipy.stats import wasserstein_distance

_CUBE = np.ones((3, 3, 3), dtype=bool)
_BESIDE_MM = 2.0  # ours: partial volume of voxels of 1.5 mm reaches so far beyond a label
_SEARCHED_MM, _AROUND_MM = 3.0, 4.5  # ours: two voxels and three of 1.5 mm
_MODEL_MM = (1.5, 1.5, 1.5)


def _within(mask: BoolArray, distance_mm: float, spacing_mm: Sequence[float]) -> BoolArray:
    """Voxels in a box of so many mm, at least one voxel, on each side of those of a mask."""
    grown = mask.astype(np.uint8)
    for axis, voxels in enumerate(_voxels(distance_mm, spacing_mm)):
        grown = ndimage.maximum_filter1d(grown, 2 * voxels + 1, axis, mode="constant")
    return grown > 0


def _voxels(distance_mm: float, spacing_mm: Sequence[float]) -> list[int]:
    return [max(1, round(distance_mm / float(s))) for s in spacing_mm]


def around_vessels(
    label: np.ndarray, labels: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[slice, slice, slice] | None:
    """Box of all that `vessel_regions` looks at; None without vessels.

    Args:
        label: (H, W, D) ids.
        labels: ids of vessels.
        spacing_mm: of the voxels, along each axis of the array.
    """
    vessel = np.isin(label, labels)
    if not vessel.any():
        return None
    reach = np.sum([_voxels(mm, spacing_mm) for mm in (_BESIDE_MM, _AROUND_MM - _BESIDE_MM, _BESIDE_MM)], 0).tolist()
    h, w, d = (
        slice(max(side.start - n, 0), side.stop + n) for side, n in zip(bounding_box(vessel), reach, strict=True)
    )
    return h, w, d


def vessel_regions(
    truth: np.ndarray, label: np.ndarray, labels: Sequence[int], spacing_mm: Sequence[float] = _MODEL_MM
) -> tuple[BoolArray, BoolArray, BoolArray]:
    """Masks of the vessels, of the tissue around them, and of where they are searched.

    Around: unlabelled, more than 2 and up to 4.5 mm away from the vessels, more than 2 mm from other labels, and no
    lung (below LUNG_BELOW_HU, -400; up to version 0.2.0 it was -300) in the true image. Searched: the vessels and
    unlabelled voxels within 3 mm of them and more than 2 mm from other labels. Lengths are rounded to voxels, at least
    one: of 1.5 mm they are 1, 3 and 2.

    Args:
        truth: (H, W, D) HU.
        label: (H, W, D) ids.
        labels: ids of vessels.
        spacing_mm: of the voxels, along each axis; without it they are taken for voxels of 1.5 mm.
    """
    vessel = np.isin(label, labels)
    free = ~_within((label > 0) & ~vessel, _BESIDE_MM, spacing_mm) & (label == 0)
    near = _within(vessel, _BESIDE_MM, spacing_mm)
    around = _within(near, _AROUND_MM - _BESIDE_MM, spacing_mm) & ~near & free & (truth > LUNG_BELOW_HU)
    return vessel, around, vessel | (_within(vessel, _SEARCHED_MM, spacing_mm) & free)


@dataclass(eq=False)
class Rendering:
    """A rendered volume beside the true one, and what measures of its vessels share, computed when first asked for.

    Args:
        rendered, truth: (H, W, D) HU; the truth is NaN where it is not known.
        label: (H, W, D) ids, the mask that it must show.
        labels: ids that are looked at.
        touches: ids of the mask that vessels come from, for example the aorta.
    """

    rendered: np.ndarray
    truth: np.ndarray
    label: np.ndarray
    labels: Sequence[int]
    touches: Sequence[int] = ()

    @cached_property
    def regions(self) -> tuple[BoolArray, BoolArray, BoolArray]:
        """`vessel_regions` of the labels."""
        return vessel_regions(self.truth, self.label, self.labels)

    @cached_property
    def vessels(self) -> MaskPair | None:
        """Vessels that a threshold finds in the rendered image near those of the label, and these; lengths in voxels.

        The threshold lies half-way between the true vessels and the tissue around them. None when either is empty, or
        the true image unknown. The true image itself is not found whole: thin branches vanish in partial volume and
        noise.
        """
        vessel, around, searched = self.regions
        if not vessel.any() or not around.any():
            return None
        threshold = (self.truth[vessel].mean() + self.truth[around].mean()) / 2
        return MaskPair((self.rendered > threshold) & searched, vessel, self.label, self.touches)


def label_mean_error(case: Rendering) -> float:
    """Mean over labels of |difference of label means| in HU; NaN when none of the labels has 8 voxels."""
    size = max([int(case.label.max()), *case.labels]) + 1
    label = torch.from_numpy(case.label)
    means = [label_statistics(torch.from_numpy(v), label, size)[:, 0] for v in (case.rendered, case.truth)]
    difference = (means[0] - means[1]).abs()[list(case.labels)]
    return float(difference.nanmean())


def label_mean_score(case: Rendering) -> float:
    """Minus `label_mean_error`, for handlers that keep the largest value."""
    return -label_mean_error(case)


def label_wasserstein(case: Rendering) -> float:
    """Mean over labels of the Wasserstein distance between the HU of a label, rendered and true, in HU.

    A shift counts as much as it is, a wrong spread or shape too. NaN when none of the labels has 8 voxels.
    """
    inside = [case.label == k for k in case.labels if np.count_nonzero(case.label == k) >= MIN_VOXELS]
    distances = [wasserstein_distance(case.rendered[mask], case.truth[mask]) for mask in inside]
    return float(np.mean(distances)) if distances else float("nan")


def grain_ratio(case: Rendering) -> float:
    """Noise SD inside the labels, rendered over true; NaN when the truth has none."""
    inside = ndimage.binary_erosion(np.isin(case.label, case.labels), _CUBE)
    reference = noise_sd(case.truth, inside)
    return noise_sd(case.rendered, inside) / reference if reference > 0 else float("nan")


def mean_absolute_error(case: Rendering) -> float:
    """Mean |difference| in HU over the voxels of the labels (0 is the background); NaN when they are absent."""
    inside = np.isin(case.label, case.labels)
    return float(np.abs(case.rendered[inside] - case.truth[inside]).mean()) if inside.any() else float("nan")


def vessel_contrast_ratio(case: Rendering) -> float:
    """Mean of the vessels over that of the tissue around them, rendered over true.

    NaN when either is empty or the true image has no contrast there.
    """
    vessel, around, _ = case.regions
    if not vessel.any() or not around.any():
        return float("nan")
    contrasts = [float(image[vessel].mean() - image[around].mean()) for image in (case.rendered, case.truth)]
    return contrasts[0] / contrasts[1] if contrasts[1] else float("nan")


def _of_vessels(measure: Callable[[MaskPair], float], case: Rendering) -> float:
    """A measure of MASK_MEASURES between the vessels that are found and those of the label, or NaN."""
    return measure(case.vessels) if case.vessels else float("nan")


def texture_correlation(image: np.ndarray, other: np.ndarray, inside: np.ndarray) -> float:
    """Correlation of the fine texture (image minus its Gaussian of one voxel) of two volumes; a test for copying."""
    fine = [(v - ndimage.gaussian_filter(v.astype(np.float32), 1.0))[inside] for v in (image, other)]
    return float(np.corrcoef(*fine)[0, 1])


MEASURES: dict[str, Callable[[Rendering], float]] = {
    "label_mean_error": label_mean_error,
    "label_mean_score": label_mean_score,
    "label_wasserstein": label_wasserstein,
    "grain_ratio": grain_ratio,
    "mean_absolute_error": mean_absolute_error,
    "vessel_contrast_ratio": vessel_contrast_ratio,
    **{f"vessel_{name}": partial(_of_vessels, measure) for name, measure in MASK_MEASURES.items()},
}


def _group(measure: str) -> str:
    """The argument of `RenderingMetric` that names the labels a measure looks at."""
    if measure.startswith("vessel_"):
        return "thin_labels"
    return "homogeneous_labels" if measure == "grain_ratio" else "labels"


class RenderingMetric(ColumnMetric):
    """Measures of rendered volumes, a column each; vessels are looked for once a case.

    The aggregate of a column is its mean over cases where it is defined.

    Args:
        measures: names of the columns, of MEASURES.
        labels: ids of the measures that are named after labels, and of "mean_absolute_error".
        thin_labels: ids of the vessels, for measures that are named after them.
        homogeneous_labels: ids in which "grain_ratio" measures the noise.
        touches: for "vessel_attached": ids of the mask that vessels come from, for example the aorta; without: NaN.

    Raises:
        ValueError: on an unknown measure.
    """

    def __init__(
        self,
        measures: Sequence[str],
        *,
        labels: Sequence[int] = (),
        thin_labels: Sequence[int] = (),
        homogeneous_labels: Sequence[int] = (),
        touches: Sequence[int] = (),
    ) -> None:
        check_measures(measures, MEASURES)
        super().__init__(measures)
        groups = {"labels": labels, "thin_labels": thin_labels, "homogeneous_labels": homogeneous_labels}
        self.groups, self.touches = {name: list(ids) for name, ids in groups.items()}, list(touches)

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """(B, 1, H, W, D) rendered HU against (B, 2, H, W, D) true HU and label -> (B, 1, columns)."""
        if y is None or y.shape[1] != 2:
            raise ValueError("y: must be (B, 2, H, W, D), true image and label")
        values = []
        for rendered, truth in zip(y_pred.cpu().float().numpy(), y.cpu().float().numpy(), strict=True):
            volumes = rendered[0], truth[0], truth[1].round().astype(np.int64)
            cases = {name: Rendering(*volumes, ids, self.touches) for name, ids in self.groups.items()}
            values.append([MEASURES[measure](cases[_group(measure)]) for measure in self.columns])
        return torch.tensor(values, dtype=torch.float32)[:, None]
