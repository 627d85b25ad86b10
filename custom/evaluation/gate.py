"""Whether a synthetic image may join a training set: measured in the image, not in the mask. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from custom.evaluation.rendering import texture_correlation, vessel_regions
from custom.geometry.centrelines import skeleton
from custom.volumes.gate import Gate
from custom.volumes.intensity import label_statistics
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["ImageGate", "examine", "rejections"]

Volume = NDArray[np.float32]
_MIN_CONTRAST_HU = 30.0  # ours: about the noise of a scan; a template with less shows no vessels


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


def _visible_share(image: Volume, vessel: NDArray[np.bool_], threshold_hu: float) -> float:
    """Share of the vessels' centre lines that is brighter than a threshold."""
    # Averaged over the vessel voxels around: a blur would bring in the surroundings of thin vessels.
    share = ndimage.uniform_filter(vessel.astype(np.float32), 3)
    line = skeleton(vessel)
    along = ndimage.uniform_filter(np.where(vessel, image, 0).astype(np.float32), 3)[line] / share[line]
    return float((along > threshold_hu).mean())


def _own_continuity(image: Volume, label: NDArray[np.int64], thin_labels: Sequence[int]) -> float:
    """`_visible_share` of a template at half of its own contrast; 1 when it shows no vessel to compare with."""
    vessel, around, _ = vessel_regions(image, label, thin_labels)
    if not vessel.any() or not around.any():
        return 1.0
    return _visible_share(image, vessel, float(image[vessel].mean() + image[around].mean()) / 2) or 1.0


def examine(
    image: Volume,
    label: NDArray[np.int64],
    *,
    template_statistics: Sequence[Sequence[float]],
    template: tuple[Volume, NDArray[np.int64]] | None,
    thin_labels: Sequence[int],
) -> dict[str, Any]:
    """Measures an image that a gate judges.

    Args:
        image: (H, W, D) HU.
        label: (H, W, D) ids.
        template_statistics: mean and SD in HU of each label in the template, NaN where it has none.
        template: image (H, W, D) in HU and label map, aligned with the image; None without a template: continuity is
            then the share itself.
        thin_labels: ids of vessels.

    Returns:
        "label_mean_hu" {label: mean}, "label_error_hu" {label: difference from the template}, "label_sd_ratio" {label:
        SD over the template's}, "vessel_contrast", "vessel_continuity" and "template_copy"; NaN where nothing can be
        measured.
    """
    table = label_statistics(torch.from_numpy(image), torch.from_numpy(label), len(template_statistics)).numpy()
    means, (template_means, template_sds) = table[:, 0], np.asarray(template_statistics, dtype=float).T
    present = [k for k in np.unique(label).tolist() if k > 0 and np.isfinite(means[k])]
    vessel, around, _ = vessel_regions(image, label, thin_labels)
    contrast = continuity = copy = float("nan")
    wanted = np.nanmean([template_means[k] for k in thin_labels]) if thin_labels else float("nan")
    if vessel.any() and around.any() and np.isfinite(wanted):
        level = float(image[around].mean())
        if wanted - level > _MIN_CONTRAST_HU:  # a template that shows no vessels cannot ask for them
            contrast = float((image[vessel].mean() - level) / (wanted - level))
            continuity = _visible_share(image, vessel, float(wanted + level) / 2)
            if template is not None:
                continuity /= _own_continuity(*template, thin_labels)
    if template is not None and present:
        copy = texture_correlation(image, template[0], label > 0)
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
        "vessel_contrast": contrast,
        "vessel_continuity": continuity,
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
