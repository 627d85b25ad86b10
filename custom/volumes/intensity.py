"""Intensities of a scan: statistics of labels, structure and grain."""

from __future__ import annotations

import numpy as np
import torch
from custom.volumes.haar import haar_pack, space_to_depth
from skimage.restoration import denoise_tv_chambolle

MIN_VOXELS = 8  # ours: one block of 2 x 2 x 2; fewer voxels of a label have no mean worth a name
LUNG_BELOW_HU = -400.0  # between aerated lung (-850 HU) and fat (-100 HU)
_ROUND_OFF_HU = 1e-3  # what single precision leaves of a volume without grain


def label_statistics(image_hu: torch.Tensor, label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Mean and standard deviation of the image in every label.

    Args:
        image_hu, label: same shape, any number of axes.
        num_labels: label ids 0 to num_labels - 1; other ids are left out.

    Returns:
        (num_labels, 2) float32 HU; NaN for labels of fewer than 8 voxels.
    """
    ids = label.flatten().long()
    known = (ids >= 0) & (ids < num_labels)
    ids, values = ids[known], image_hu.flatten()[known].double()
    count = torch.bincount(ids, minlength=num_labels).double()
    mean = torch.bincount(ids, values, num_labels) / count
    variance = torch.bincount(ids, values**2, num_labels) / count - mean**2
    table = torch.stack([mean, variance.clamp(min=0).sqrt()], 1)
    table[count < MIN_VOXELS] = torch.nan
    return table.float()


def noise_sd(image_hu: np.ndarray, label: np.ndarray) -> float:
    """Robust standard deviation in HU of the grain inside the labels (1.48 times the MAD of diagonal Haar bands).

    Every band that is high-pass along at least two axes is used: edges are rare there and the MAD ignores them.
    Returns 0 for an image without labelled 2x2x2 blocks or without grain.

    Args:
        image_hu, label: (H, W, D).
    """
    even = tuple(slice(n - n % 2) for n in image_hu.shape)
    bands = haar_pack(torch.from_numpy(np.ascontiguousarray(image_hu[even], dtype=np.float32))[None, None])[0]
    inside = space_to_depth(torch.from_numpy(np.ascontiguousarray(label[even] > 0))[None, None])[0].all(0)
    if not bool(inside.any()):
        return 0.0
    detail = bands[[3, 5, 6, 7]][:, inside]
    sd = float(1.4826 * detail.abs().median())
    return sd if sd > _ROUND_OFF_HU else 0.0


def split_noise(image_hu: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split an image into structure and grain by total-variation denoising at the image's own noise level.

    Total variation (Chambolle 2004) keeps vessels of two voxels: on the real CTA it takes 27 of 38 HU of the grain
    and 27 of 336 HU of the coronaries (a Gaussian of one voxel takes 124 HU of them).

    Args:
        image_hu, label: (H, W, D).

    Returns:
        structure and grain, float32 HU; without grain the image itself and zeros.
    """
    sd = noise_sd(image_hu, label)
    if sd < 1.0:
        return image_hu.astype(np.float32), np.zeros_like(image_hu, dtype=np.float32)
    structure = denoise_tv_chambolle(image_hu.astype(np.float32), weight=0.65 * sd, eps=1e-3, max_num_iter=60)
    return structure.astype(np.float32), (image_hu - structure).astype(np.float32)


def surrogate_grain(grain_hu: np.ndarray, label: np.ndarray, seed: int = 0) -> np.ndarray:
    """Stationary Gaussian grain with the spectrum that the grain has inside the labels: same amplitudes, random phases.

    Grain taken from a scan also holds what denoising missed of edges and lung vessels, and would draw them elsewhere;
    random phases do not (Theiler et al. 1992, surrogate data).

    Args:
        grain_hu, label: (H, W, D).
        seed: of the phases.

    Returns:
        (H, W, D) float32 HU with the standard deviation of the grain inside the labels; zeros without labels.
    """
    inside = label > 0
    if not inside.any():
        return np.zeros_like(grain_hu, dtype=np.float32)
    sd = grain_hu[inside].std()
    amplitude = np.abs(np.fft.rfftn(np.where(inside, np.clip(grain_hu, -3 * sd, 3 * sd), 0.0)))
    white = np.random.default_rng(seed).standard_normal(grain_hu.shape)
    surrogate = np.fft.irfftn(np.fft.rfftn(white) * amplitude, s=grain_hu.shape, axes=(0, 1, 2))
    return (surrogate * (sd / max(surrogate.std(), 1e-6))).astype(np.float32)
