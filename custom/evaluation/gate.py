"""Whether a synthetic image may join a training set: measured in the image, not in the mask. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from custom.evaluation.rendering import around_vessels, texture_correlation, vessel_regions
from custom.geometry.centrelines import skeleton
from custom.volumes.gate import Gate
from custom.volumes.intensity import MIN_VOXELS, label_statistics
from numpy.typing import NDArray
from scipy import ndimage

__all__ = [
    "ImageGate",
    "VesselReference",
    "examine_labels",
    "examine_vessels",
    "rejections",
    "vessel_contrast_hu",
    "vessel_reference",
]

Volume = NDArray[np.float32]
_MIN_CONTRAST_HU = 30.0  # ours: about the noise of a scan; a template with less shows no vessels
_ALONG_MM = 1.5  # ours: on each side; a coronary of 3 mm in full, and one voxel of the model


@dataclass(frozen=True)
class ImageGate(Gate):
    """Limits of acceptance; None switches one off.

    Attributes:
        max_label_error_hu: largest difference of a label's mean from the template's (thin labels apart).
        max_label_sd_ratio: largest standard deviation of a label over that in the template (thin labels apart): no
            label drowned in noise.
        plausible_hu: label id -> lowest and highest mean that a scan can have, HU.
        max_score_hu: largest sample score.
        min_vessel_contrast: smallest contrast of thin labels over their surroundings, as a share of the template's.
        min_vessel_continuity: smallest share of their centre lines that is brighter than half of that contrast, over
            the same share in the template, whose own fine branches fade as well.
        max_template_copy: largest correlation of fine texture with the template inside the labels: no copies.
    """

    max_label_error_hu: float | None = 60.0
    max_label_sd_ratio: float | None = 2.5
    plausible_hu: Mapping[int, tuple[float, float]] | None = None
    max_score_hu: float | None = None
    min_vessel_contrast: float | None = 0.5
    min_vessel_continuity: float | None = 0.7
    max_template_copy: float | None = 0.8


class VesselReference(NamedTuple):
    """What the vessels of a template show, which those of an image are held against.

    Attributes:
        mean_hu: of the vessels; NaN where there are fewer than 8 voxels of them.
        continuity: share of their centre lines brighter than half of their own contrast; 1 where nothing is shown.
    """

    mean_hu: float
    continuity: float = 1.0


class _Vessels:
    """The vessels of an image and what lies around them, cut out of it; arguments as `vessel_reference`."""

    def __init__(
        self, image: Volume, label: NDArray[Any], thin_labels: Sequence[int], spacing_mm: Sequence[float]
    ) -> None:
        self.mean_hu = self.around_hu = float("nan")
        box = around_vessels(label, thin_labels, spacing_mm)
        if box is None:
            return
        self.image, self.spacing_mm = image[box].astype(np.float32), spacing_mm
        self.mask, around, _ = vessel_regions(self.image, label[box], thin_labels, spacing_mm)
        if np.count_nonzero(self.mask) >= MIN_VOXELS:
            self.mean_hu = float(self.image[self.mask].mean())
        if around.any():
            self.around_hu = float(self.image[around].mean())

    def visible_share(self, threshold_hu: float) -> float:
        """Share of the centre lines that is brighter than a threshold."""
        # Averaged over the vessel voxels around: a blur would bring in the surroundings of thin vessels.
        size = [2 * max(1, round(_ALONG_MM / float(s))) + 1 for s in self.spacing_mm]
        line = skeleton(self.mask)
        share = ndimage.uniform_filter(self.mask.astype(np.float32), size)[line]
        along = ndimage.uniform_filter(np.where(self.mask, self.image, 0), size)[line] / share
        return float((along > threshold_hu).mean())


def vessel_reference(
    image: Volume, label: NDArray[Any], *, thin_labels: Sequence[int], spacing_mm: Sequence[float]
) -> VesselReference:
    """Measures the vessels of a template.

    Args:
        image: (H, W, D) HU.
        label: (H, W, D) ids.
        thin_labels: ids of vessels.
        spacing_mm: of the voxels, along each axis.
    """
    vessels = _Vessels(image, label, thin_labels, spacing_mm)
    threshold = (vessels.mean_hu + vessels.around_hu) / 2
    share = vessels.visible_share(threshold) if np.isfinite(threshold) else 0.0
    return VesselReference(vessels.mean_hu, share or 1.0)


def vessel_contrast_hu(
    image: Volume, label: NDArray[Any], *, thin_labels: Sequence[int], spacing_mm: Sequence[float]
) -> float:
    """How far vessels are brighter than the tissue around them, HU; NaN where there are none. As `vessel_reference`."""
    vessels = _Vessels(image, label, thin_labels, spacing_mm)
    return vessels.mean_hu - vessels.around_hu


def examine_vessels(
    image: Volume,
    label: NDArray[Any],
    *,
    template: VesselReference,
    thin_labels: Sequence[int],
    spacing_mm: Sequence[float],
) -> dict[str, float]:
    """Measures the vessels of an image that a gate judges, on whatever grid: distances are lengths.

    Args:
        image, label, thin_labels, spacing_mm: as :func:`vessel_reference`.
        template: what its vessels show.

    Returns:
        "vessel_contrast" and "vessel_continuity"; NaN where nothing can be measured.
    """
    contrast = continuity = float("nan")
    vessels = _Vessels(image, label, thin_labels, spacing_mm)
    wanted = template.mean_hu - vessels.around_hu
    if wanted > _MIN_CONTRAST_HU and np.isfinite(vessels.mean_hu):  # a template without vessels cannot ask for them
        contrast = (vessels.mean_hu - vessels.around_hu) / wanted
        continuity = vessels.visible_share(vessels.around_hu + wanted / 2) / template.continuity
    return {"vessel_contrast": contrast, "vessel_continuity": continuity}


def examine_labels(
    image: Volume,
    label: NDArray[np.int64],
    *,
    template_statistics: Sequence[Sequence[float]],
    template_image: Volume | None,
    thin_labels: Sequence[int],
) -> dict[str, Any]:
    """Measures the labels of an image that a gate judges.

    Args:
        image: (H, W, D) HU.
        label: (H, W, D) ids.
        template_statistics: mean and SD in HU of each label in the template, NaN where it has none.
        template_image: (H, W, D) HU, aligned with the image; None without a template.
        thin_labels: ids of vessels.

    Returns:
        "label_mean_hu" {label: mean}, "label_error_hu" {label: difference from the template}, "label_sd_ratio" {label:
        SD over the template's} and "template_copy"; NaN where nothing can be measured.
    """
    table = label_statistics(torch.from_numpy(image), torch.from_numpy(label), len(template_statistics)).numpy()
    means, (template_means, template_sds) = table[:, 0], np.asarray(template_statistics, dtype=float).T
    present = [k for k in np.unique(label).tolist() if k > 0 and np.isfinite(means[k])]
    copy = float("nan")
    if template_image is not None and present:
        copy = texture_correlation(image, template_image, label > 0)
    return {
        "label_mean_hu": {k: float(means[k]) for k in present},
        "label_error_hu": {
            k: float(means[k] - template_means[k])
            for k in present
            if k not in thin_labels and np.isfinite(template_means[k])
        },
        "label_sd_ratio": {
            k: float(table[k, 1] / template_sds[k]) for k in present if k not in thin_labels and template_sds[k] > 0
        },
        "template_copy": copy,
    }


def rejections(measures: Mapping[str, Any], score_hu: float, gate: ImageGate) -> list[str]:
    """Every limit that an image breaks, with value and limit; empty when it may join. What is NaN breaks nothing."""
    broken = []
    for k, error in measures["label_error_hu"].items():
        if gate.max_label_error_hu is not None and abs(error) > gate.max_label_error_hu:
            broken.append(f"max_label_error_hu: label {k} is {error:+.0f} HU off its template")
    for k, ratio in measures["label_sd_ratio"].items():
        if gate.max_label_sd_ratio is not None and ratio > gate.max_label_sd_ratio:
            broken.append(f"max_label_sd_ratio: label {k} has {ratio:.1f} times the SD of its template")
    for k, (low, high) in (gate.plausible_hu or {}).items():
        mean = measures["label_mean_hu"].get(k)
        if mean is not None and not low <= mean <= high:
            broken.append(f"plausible_hu: label {k} has {mean:.0f} HU, plausible are {low:.0f} to {high:.0f}")
    lowest = {"vessel_contrast": gate.min_vessel_contrast, "vessel_continuity": gate.min_vessel_continuity}
    for name, limit in lowest.items():
        if limit is not None and measures[name] < limit:
            broken.append(f"min_{name}: {measures[name]:.2f}, at least {limit}")
    if gate.max_template_copy is not None and measures["template_copy"] > gate.max_template_copy:
        broken.append(f"max_template_copy: {measures['template_copy']:.2f}, at most {gate.max_template_copy}")
    if gate.max_score_hu is not None and score_hu > gate.max_score_hu:
        broken.append(f"max_score_hu: {score_hu:.1f}, at most {gate.max_score_hu}")
    return broken
