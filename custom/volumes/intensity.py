"""Intensities of a scan: statistics of labels, its noise, and the split into structure and grain."""

from __future__ import annotations

import numpy as np
import torch
from custom.geometry.topology import bounding_box
from custom.volumes.haar import haar_pack, space_to_depth
from numpy.typing import NDArray
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle

MIN_VOXELS = 8  # ours: one block of 2 x 2 x 2; fewer voxels of a label have no mean worth a name
LUNG_BELOW_HU = -400.0  # between aerated lung (-850 HU) and fat (-100 HU)
_GIVEN_BACK_VOXELS = 2.0  # ours: some 15 voxels of a coronary, whose mean has a quarter of the noise
ENOUGH_VOXELS = 500  # ours: a robust deviation of 60 blocks of 2 x 2 x 2 is known to 5 %
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
    labelled = label > 0
    if not labelled.any():
        return 0.0
    h, w, d = (slice(side.start - side.start % 2, side.stop) for side in bounding_box(labelled))  # whole blocks
    inside = space_to_depth(_even(labelled[h, w, d]))[0].all(0)
    return _robust_sd(_diagonal_bands(image_hu[h, w, d])[:, inside])


def _even(values: NDArray) -> torch.Tensor:
    """(1, 1, H, W, D) without the last voxel of odd axes, to be taken apart into blocks of 2 x 2 x 2."""
    return torch.from_numpy(np.ascontiguousarray(values[tuple(slice(n - n % 2) for n in values.shape)]))[None, None]


def _diagonal_bands(image_hu: np.ndarray) -> torch.Tensor:
    """Haar bands (4, H/2, W/2, D/2) that are high-pass along two axes or three."""
    return haar_pack(_even(np.asarray(image_hu, dtype=np.float32)))[0, [3, 5, 6, 7]]


def _robust_sd(detail: torch.Tensor) -> float:
    """Standard deviation by the MAD of coefficients (4, N) around 0; 0 where there are none."""
    sd = float(1.4826 * detail.abs().median()) if detail.numel() else 0.0
    return sd if sd > _ROUND_OFF_HU else 0.0


def interior(label: np.ndarray) -> np.ndarray:
    """Labels without the two layers of voxels at their edges, where 0 takes their place; (H, W, D).

    The erosion of every label by itself, the outside of the volume being background, but of all at once.
    """
    alike = label > 0
    for axis in range(label.ndim):
        step = np.moveaxis(np.diff(label, axis=axis, prepend=0, append=0) != 0, axis, 0)
        np.moveaxis(alike, axis, 0)[...] &= ~(step[:-1] | step[1:])
    return np.where(ndimage.binary_erosion(alike), label, 0)


def interior_noise_sd(image_hu: np.ndarray, label: np.ndarray) -> float:
    """Median over labels of the robust noise SD inside each, away from its edges, in HU. Ours.

    Trabeculae and mixing contrast agent raise `noise_sd` of the labels that have them; those are the fewer.

    Args:
        image_hu, label: (H, W, D).

    Returns:
        HU; `noise_sd` of everything where no label is large enough.
    """
    return median_sd(block_details(image_hu, interior_blocks(label)))


def interior_blocks(label: np.ndarray) -> list[torch.Tensor]:
    """Which 2 x 2 x 2 blocks lie in the interior of each label that is large enough, else in all labels together."""
    core = interior(label)
    ids, counts = np.unique(core[core > 0], return_counts=True)
    blocks = space_to_depth(_even(core))[0]
    of_one = (blocks == blocks[:1]).all(0)
    inside = [of_one & (blocks[0] == k) for k in ids[counts >= ENOUGH_VOXELS].tolist()]
    return inside or [space_to_depth(_even(label > 0))[0].all(0)]


def block_details(image_hu: np.ndarray, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Diagonal Haar coefficients (4, N) of the blocks of each label."""
    bands = _diagonal_bands(image_hu)
    return [bands[:, inside] for inside in blocks]


def median_sd(details: list[torch.Tensor]) -> float:
    """Median over labels of the robust deviation of their coefficients."""
    return float(np.median([_robust_sd(detail) for detail in details]))


def split_noise(image_hu: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split an image into structure and grain by total-variation denoising at the image's own noise level.

    Total variation (Chambolle 2004) keeps edges but takes contrast from all that is small: coronaries of phantoms at
    1.5 mm lose 50 HU. So every label gets back what was taken on average around each of its voxels: noise averages out
    there, lost signal does not (ours; it halves the error of the coronaries, docs/FINDINGS.md).

    Args:
        image_hu, label: (H, W, D).

    Returns:
        structure and grain, float32 HU; without grain the image itself and zeros.
    """
    sd = noise_sd(image_hu, label)
    if sd < 1.0:
        return image_hu.astype(np.float32), np.zeros_like(image_hu, dtype=np.float32)
    structure = denoise_tv_chambolle(image_hu.astype(np.float32), weight=0.65 * sd, eps=1e-3, max_num_iter=60)
    structure = structure + _lost_signal(image_hu - structure, label)
    return structure.astype(np.float32), (image_hu - structure).astype(np.float32)


def _lost_signal(taken_hu: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Local mean of what denoising took, over the voxels of each label alone; 0 in the background. (H, W, D) HU."""
    lost = np.zeros(label.shape, dtype=np.float32)
    weights = [ndimage.gaussian_filter1d(np.eye(n, dtype=np.float32), _GIVEN_BACK_VOXELS, axis=0) for n in label.shape]
    for k, box in enumerate(ndimage.find_objects(label.astype(np.int64)), start=1):
        if box is None:
            continue
        inside = (label[box] == k).astype(np.float32)
        around = [w[s, s] for w, s in zip(weights, box, strict=True)]  # beyond the box there is nothing of the label
        mean, share = (_along_axes(part, around) for part in (taken_hu[box] * inside, inside))
        lost[box] += np.where(inside > 0, mean / np.maximum(share, 1e-6), 0)
    return lost


def _along_axes(values: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Multiply (H, W, D) along every axis by its matrix."""
    for axis, matrix in enumerate(matrices):
        values = np.moveaxis(np.tensordot(matrix, values, (1, axis)), 0, axis)
    return values
