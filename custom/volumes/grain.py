"""The grain of a scan: its spectrum, how strong it is from place to place, and more of its kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from custom.geometry.topology import bounding_box
from custom.volumes.intensity import ENOUGH_VOXELS, block_details, interior, interior_blocks, median_sd
from scipy import fft, ndimage

GRAIN_REACH = 8  # voxels, ours: CT noise is correlated over 2 to 3 mm
_CLIPPED_AT = 3.0  # deviations, ours: Gaussian noise lies within, edges that denoising missed do not
_AROUND_VOXELS = 4.0  # ours: the dose changes over centimetres, and 500 voxels tell a deviation to 3 %
_COARSE_VOXELS = 3.0  # ours: CT noise has little power at longer waves, the texture of tissue has most of its own there
_CORRECTIONS = 3  # leave less than 1 % on the real CTA


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
        if box is None or np.count_nonzero(core[box] == k) < ENOUGH_VOXELS:
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
    blocks = interior_blocks(label)
    of_grain, of_structure = (block_details(part, blocks) for part in (grain, structure_hu))
    has, own = median_sd(of_grain), median_sd(of_structure)
    if has == 0 or own >= noise_sd_hu:
        return structure_hu.astype(np.float32)
    variance = (noise_sd_hu**2 - own**2) / has**2
    for _ in range(_CORRECTIONS):  # robust variances add up only about
        reached = median_sd([of + variance**0.5 * drawn for of, drawn in zip(of_structure, of_grain, strict=True)])
        variance = max(variance + (noise_sd_hu**2 - reached**2) / has**2, 0.0)
    return (structure_hu + variance**0.5 * grain).astype(np.float32)
