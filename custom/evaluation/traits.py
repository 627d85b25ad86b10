"""What a clinician compares two sets of cases by: volumes, attenuation, noise and coronaries of every case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from custom.evaluation.gate import vessel_contrast_hu
from custom.geometry.centrelines import line_lengths, skeleton
from custom.geometry.topology import bounding_box
from custom.volumes.intensity import label_statistics, noise_sd
from numpy.typing import NDArray

__all__ = ["case_traits"]


def case_traits(
    image: NDArray,
    label: NDArray,
    spacing_mm: Sequence[float],
    *,
    label_names: Sequence[str],
    thin_labels: Sequence[int],
) -> dict[str, Any]:
    """Measures one case, synthetic or real. Compare cases at one spacing: coarser voxels average noise away.

    Args:
        image: (H, W, D) HU.
        label: (H, W, D) ids.
        spacing_mm: of the voxels, along each axis.
        label_names: one for each id, background first.
        thin_labels: ids of vessels.

    Returns:
        "volume_ml" and "mean_hu" {label name: value}, a label that is absent left out; "noise_hu", robust SD inside the
        labels; "vessel_length_mm" of the centre lines and "vessel_contrast_hu" over the tissue around them, NaN where
        nothing can be measured.
    """
    ids, hu = np.asarray(label).round().astype(np.uint16), np.asarray(image, dtype=np.float32)
    inside = ids > 0
    own = ids[inside].astype(np.int64)
    means = label_statistics(torch.from_numpy(hu[inside]), torch.from_numpy(own), len(label_names))[:, 0].tolist()
    counts = np.bincount(own, minlength=len(label_names))
    present = [k for k in range(1, len(label_names)) if counts[k]]
    vessels = np.isin(ids, thin_labels)
    length = float("nan")
    if vessels.any():
        length = float(line_lengths(skeleton(vessels[bounding_box(vessels)]), spacing_mm).sum())
    return {
        "volume_ml": {label_names[k]: float(counts[k] * np.prod(spacing_mm) / 1000) for k in present},
        "mean_hu": {label_names[k]: means[k] for k in present},
        "noise_hu": noise_sd(hu, ids),
        "vessel_length_mm": length,
        "vessel_contrast_hu": vessel_contrast_hu(hu, ids, thin_labels=thin_labels, spacing_mm=spacing_mm),
    }
