"""Intensities of a scan: statistics of labels, structure and grain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from custom.geometry.topology import bounding_box
from custom.volumes.haar import haar_pack, space_to_depth
from numpy.typing import NDArray
from scipy import fft, ndimage
from skimage.restoration import denoise_tv_chambolle

MIN_VOXELS = 8  # ours: one block of 2 x 2 x 2; fewer voxels of a label have no mean worth a name
LUNG_BELOW_HU = -400.0  # between aerated lung (-850 HU) and fat (-100 HU)
GRAIN_REACH = 8  # voxels, ours: CT noise is correlated over 2 to 3 mm
_CLIPPED_AT = 3.0  # deviations, ours: Gaussian noise lies within, edges that denoising missed do not
_AROUND_VOXELS = 4.0  # ours: the dose changes over centimetres, and 500 voxels tell a deviation to 3 %
_GIVEN_BACK_VOXELS = 2.0  # ours: some 15 voxels of a coronary, whose mean has a quarter of the noise
_COARSE_VOXELS = 3.0  # ours: CT noise has little power at longer waves, the texture of tissue has most of its own there
_CORRECTIONS = 3  # leave less than 1 % on the real CTA
_ENOUGH_VOXELS = 500  # ours: a robust deviation of 60 blocks of 2 x 2 x 2 is known to 5 %
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
    return _median_sd(_details(image_hu, _interior_blocks(label)))


def _interior_blocks(label: np.ndarray) -> list[torch.Tensor]:
    """Which 2 x 2 x 2 blocks lie in the interior of each label that is large enough, else in all labels together."""
    core = interior(label)
    ids, counts = np.unique(core[core > 0], return_counts=True)
    blocks = space_to_depth(_even(core))[0]
    of_one = (blocks == blocks[:1]).all(0)
    inside = [of_one & (blocks[0] == k) for k in ids[counts >= _ENOUGH_VOXELS].tolist()]
    return inside or [space_to_depth(_even(label > 0))[0].all(0)]


def _details(image_hu: np.ndarray, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Diagonal Haar coefficients (4, N) of the blocks of each label."""
    bands = _diagonal_bands(image_hu)
    return [bands[:, inside] for inside in blocks]


def _median_sd(details: list[torch.Tensor]) -> float:
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


def power_spectrum(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Power spectrum of a texture in a region of any shape, by its tapered autocovariance (Blackman & Tukey 1958).

    The covariance of every lag up to 8 voxels is divided by the number of pairs in the region, so that the region's
    shape does not count.

    Args:
        values: (H, W, D); their mean in the region is taken off.
        inside: (H, W, D) bool, not empty.

    Returns:
        (17, 17, 9) as of `numpy.fft.rfftn`, at least 0, in squared units of the values a voxel.
    """
    box = bounding_box(inside)
    mask = inside[box]
    centred = np.where(mask, values[box] - values[inside].mean(), 0.0)
    shape = [fft.next_fast_len(n + GRAIN_REACH, real=True) for n in mask.shape]  # no lag up to the reach wraps around
    products, pairs = (np.fft.irfftn(np.abs(np.fft.rfftn(v, shape)) ** 2, shape) for v in (centred, mask.astype(float)))
    lags = np.ix_(*[np.arange(-GRAIN_REACH, GRAIN_REACH + 1)] * 3)
    taper = np.hanning(2 * GRAIN_REACH + 3)[1:-1]
    covariance = products[lags] / np.maximum(pairs[lags], 1) * taper[:, None, None] * taper[:, None] * taper
    return np.fft.rfftn(np.fft.ifftshift(covariance)).real.clip(min=0)


def fine_spectrum(image_hu: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Power spectrum of what is fine inside labels, away from their edges: the median over labels. Ours.

    Trabeculae and mixing contrast agent are coarse, or raise the fewer labels. The local mean over some 3 voxels is
    taken off, and what exceeds three deviations is clipped.

    Args:
        image_hu, label: (H, W, D).

    Returns:
        (17, 17, 9) as :func:`power_spectrum`; zeros where no label is large enough.
    """
    core = interior(label)
    spectra = [np.zeros((2 * GRAIN_REACH + 1, 2 * GRAIN_REACH + 1, GRAIN_REACH + 1))]
    for k, box in enumerate(ndimage.find_objects(core.astype(np.int64)), start=1):
        if box is None or np.count_nonzero(core[box] == k) < _ENOUGH_VOXELS:
            continue
        inside = core[box] == k
        values = np.where(inside, image_hu[box] - image_hu[box][inside].mean(), 0).astype(np.float32)
        local, share = (ndimage.gaussian_filter(v, _COARSE_VOXELS) for v in (values, inside.astype(np.float32)))
        spectra.append(power_spectrum(_clipped(values - local / np.maximum(share, 1e-6), inside), inside))
    return np.median(spectra[1:] or spectra, axis=0)


def grain_spectrum(structure_hu: np.ndarray, grain_hu: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Power spectrum that the noise of a scan has inside its labels, (17, 17, 9): of the scan, not of its grain.

    Denoising takes fine noise and leaves coarser noise in the structure, so the grain alone would be too fine.

    Args:
        structure_hu, grain_hu: (H, W, D), which :func:`split_noise` made.
        label: (H, W, D) ids. Where none is large enough to look inside, the grain has to do.
    """
    spectrum, inside = fine_spectrum(structure_hu + grain_hu, label), label > 0
    return power_spectrum(_clipped(grain_hu, inside), inside) if inside.any() and not spectrum.any() else spectrum


def _clipped(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Within three standard deviations: what denoising missed of edges and lung vessels is no grain."""
    sd = float(values[inside].std())
    return np.clip(values, -_CLIPPED_AT * sd, _CLIPPED_AT * sd)


def gaussian_spectrum(noise_sd_hu: float, sigma_voxels: Sequence[float]) -> np.ndarray:
    """Power spectrum of white noise blurred by a Gaussian, as strong as makes its :func:`noise_sd` the given one.

    That looks at Haar bands that are high-pass along two axes or three, so the noise as a whole is stronger.

    Args:
        noise_sd_hu: HU.
        sigma_voxels: of the Gaussian along each axis.

    Returns:
        (17, 17, 9) as :func:`power_spectrum`.
    """
    size = 2 * GRAIN_REACH + 1
    lines = [np.fft.fftfreq(size), np.fft.fftfreq(size), np.fft.rfftfreq(size)]
    f = np.meshgrid(*lines, indexing="ij")
    spectrum = np.exp(-4 * np.pi**2 * sum((along * s) ** 2 for along, s in zip(f, sigma_voxels, strict=True)))
    low, high = ([1 + sign * np.cos(2 * np.pi * along) for along in f] for sign in (1, -1))
    fine = high[0] * high[1] * low[2] + high[0] * low[1] * high[2] + low[0] * high[1] * high[2]
    fine = (fine + high[0] * high[1] * high[2]) / 4
    twice = np.where(lines[2] > 0, 2, 1)  # what `rfftn` leaves out
    return spectrum * (noise_sd_hu**2 / ((spectrum * fine * twice).sum() / size**3))


def grain_kernel(spectrum: np.ndarray) -> np.ndarray:
    """Filter that gives white noise a spectrum, and random phases (Theiler et al. 1992, surrogate data).

    Args:
        spectrum: (17, 17, 9) as of `numpy.fft.rfftn`, at least 0.

    Returns:
        (17, 17, 17) float32 of unit norm: white noise of unit variance keeps it. A single 1 for a spectrum of zeros.
    """
    size = 2 * GRAIN_REACH + 1
    amplitude = np.sqrt(spectrum if spectrum.any() else np.ones_like(spectrum))
    impulse = np.fft.fftshift(np.fft.irfftn(amplitude, (size,) * 3, axes=(0, 1, 2)))
    return (impulse / np.linalg.norm(impulse)).astype(np.float32)


def local_sd(grain_hu: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Standard deviation of the grain around each voxel, (H, W, D) float32 HU, over about 9 voxels. Ours."""
    inside = label > 0
    sd = float(grain_hu[inside].std()) if inside.any() else float(grain_hu.std())
    clipped = np.clip(grain_hu, -_CLIPPED_AT * sd, _CLIPPED_AT * sd).astype(np.float32)
    return np.sqrt(ndimage.gaussian_filter(clipped**2, _AROUND_VOXELS))


def draw_grain(kernel: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Grain of unit variance everywhere: white noise through a :func:`grain_kernel`.

    Args:
        kernel: (K, K, K), K odd.
        white: (H + K - 1, W + K - 1, D + K - 1), so much larger that the grain is as strong at the border as inside.

    Returns:
        (H, W, D) float32.
    """
    shape = [fft.next_fast_len(n, real=True) for n in white.shape]
    drawn = fft.irfftn(fft.rfftn(white, shape) * fft.rfftn(kernel, shape), shape)
    inside = tuple(slice(k - 1, n) for k, n in zip(kernel.shape, white.shape, strict=True))  # nothing wraps around here
    return drawn[inside].astype(np.float32)


def with_grain(
    structure_hu: np.ndarray, label: np.ndarray, *, unit_grain: np.ndarray, local_sd_hu: np.ndarray, noise_sd_hu: float
) -> np.ndarray:
    """Put grain on a structure, as strong as makes `interior_noise_sd` of the result that of a scan. Ours.

    Denoising takes two thirds of a scan's noise; the rest stayed in its structure. Drawn structure has none, so the
    grain has to make up for it.

    Args:
        structure_hu, label: (H, W, D).
        unit_grain: (H, W, D) of unit variance.
        local_sd_hu: (H, W, D), how strong it is where.
        noise_sd_hu: of the result inside the labels.

    Returns:
        (H, W, D) float32 HU.
    """
    grain = unit_grain * local_sd_hu
    blocks = _interior_blocks(label)
    of_grain, of_structure = (_details(part, blocks) for part in (grain, structure_hu))
    has, own = _median_sd(of_grain), _median_sd(of_structure)
    if has == 0 or own >= noise_sd_hu:
        return structure_hu.astype(np.float32)
    variance = (noise_sd_hu**2 - own**2) / has**2
    for _ in range(_CORRECTIONS):  # robust variances add up only about
        reached = _median_sd([of + variance**0.5 * drawn for of, drawn in zip(of_structure, of_grain, strict=True)])
        variance = max(variance + (noise_sd_hu**2 - reached**2) / has**2, 0.0)
    return (structure_hu + variance**0.5 * grain).astype(np.float32)
