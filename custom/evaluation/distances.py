"""What tells two sets of labelled volumes apart, and whether one was copied from the other.

Sets are compared by features: any function (image, label) -> vector will do; `radiomic_features` is ours and needs no
trained network. Matrices of features are (cases, features).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from custom.geometry.topology import bounding_box
from custom.volumes.intensity import MIN_VOXELS, noise_sd
from monai.metrics.fid import get_fid_score
from monai.metrics.regression import compute_ms_ssim
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu, skew

__all__ = [
    "copying_p_value",
    "distance_ratios",
    "frechet_distance",
    "kernel_distance",
    "local_correlation",
    "mean_shifts",
    "ms_ssim",
    "radiomic_features",
    "radiomic_names",
    "standardised",
]

Matrix = NDArray[np.float64]
_KINDS = ("mean", "sd", "skewness", "p5", "median", "p95", "fine texture", "coarse texture", "log volume")
# Wang et al. 2003, without the coarsest of five scales, which a volume of 64 voxels does not have; to sum 1.
_SCALE_WEIGHTS = (0.0517, 0.3295, 0.3462, 0.2726)
_NO_TEXTURE = 1e-5  # variance of 3 HU in an intensity window of 1000 HU


def radiomic_features(image: NDArray, label: NDArray, *, num_labels: int) -> Matrix:
    """Nine numbers for each label, the background included, and the grain. Ours.

    Mean, standard deviation, skewness, 5th, 50th and 95th percentile; texture at two scales, see `_textures`; logarithm
    of the volume.

    Args:
        image: (H, W, D) HU, cropped to the heart, at a spacing that all compared volumes share.
        label: (H, W, D) ids.
        num_labels: label ids 0 to num_labels - 1.

    Returns:
        (9 * num_labels + 1,); NaN where a label has fewer than 8 voxels, but for its volume.
    """
    volume = np.asarray(image, dtype=np.float32)
    rows = np.full((num_labels, len(_KINDS)), np.nan)
    for k in range(num_labels):
        inside = np.asarray(label) == k
        rows[k, 8] = np.log1p(np.count_nonzero(inside))
        if np.count_nonzero(inside) >= MIN_VOXELS:
            values = volume[inside].astype(np.float64)
            sd = values.std()
            rows[k, :3] = values.mean(), sd, skew(values) if sd > 0 else 0.0
            rows[k, 3:6] = np.percentile(values, (5, 50, 95))
            rows[k, 6:8] = _textures(volume, inside)
    return np.append(rows.ravel(), noise_sd(volume, np.asarray(label)))


def _textures(image: NDArray, inside: NDArray) -> tuple[float, float]:
    """Standard deviations, inside a mask, of image minus its Gaussian of 1 voxel, and of that minus one of 3 voxels.

    The Gaussians weigh voxels of the mask alone (normalised convolution): what lies beside it does not count.
    """
    box = bounding_box(inside)
    mask = inside[box]
    values = np.where(mask, image[box] - image[inside].mean(), 0)
    weight = mask.astype(np.float32)
    fine, coarse = (
        ndimage.gaussian_filter(values, sigma, mode="constant")[mask]
        / ndimage.gaussian_filter(weight, sigma, mode="constant")[mask]
        for sigma in (1.0, 3.0)
    )
    return float((values[mask] - fine).std()), float((fine - coarse).std())


def radiomic_names(label_names: Sequence[str]) -> list[str]:
    """Names of the features of `radiomic_features`, in their order, for the names of all labels."""
    return [f"{label}: {kind}" for label in label_names for kind in _KINDS] + ["grain"]


def _mean_and_sd(reference: Matrix) -> tuple[Matrix, Matrix]:
    """Mean and standard deviation of each feature, NaN left out; sd NaN for a feature that does not vary."""
    known = np.isfinite(reference)
    count = known.sum(0)
    mean = np.where(known, reference, 0).sum(0) / np.maximum(count, 1)
    sd = np.sqrt((np.where(known, reference - mean, 0) ** 2).sum(0) / np.maximum(count - 1, 1))
    return mean, np.where(sd > 1e-6 * np.maximum(np.abs(mean), 1e-6), sd, np.nan)


def standardised(features: Matrix, reference: Matrix) -> Matrix:
    """Features in standard deviations from the mean of a reference set.

    A feature that does not vary in the reference has no scale and is left out. What is missing (NaN) becomes 0: neither
    near nor far.

    Args:
        features: (N, D).
        reference: (M, D), at least two cases.

    Returns:
        (N, D'), finite.

    Raises:
        ValueError: if the numbers of features differ, or the reference has fewer than two cases or no feature varies.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1] or len(reference) < 2:
        raise ValueError(
            "features: two matrices (cases, features) with equal features and at least two reference cases are needed, "
            f"got {features.shape} and {reference.shape}"
        )
    mean, sd = _mean_and_sd(reference)
    varies = np.isfinite(sd)
    if not varies.any():
        raise ValueError("features: none varies in the reference set; all its cases are the same")
    scaled = (features[:, varies] - mean[varies]) / sd[varies]
    return np.where(np.isfinite(scaled), scaled, 0.0)


def mean_shifts(features: Matrix, reference: Matrix) -> NDArray[np.float64]:
    """Mean of each feature over a set, in standard deviations of the reference from its mean.

    Args:
        features: (N, D).
        reference: (M, D).

    Returns:
        (D,); NaN for a feature that is missing in either set or does not vary in the reference.
    """
    mean, sd = _mean_and_sd(reference)
    known = np.isfinite(features)
    count = np.where(known.any(0), known.sum(0), np.nan)
    return (np.where(known, features, 0).sum(0) / count - mean) / sd


def _squared_discrepancy(within_x: Matrix, within_y: Matrix, between: Matrix) -> float:
    """Unbiased MMD^2 from kernel matrices: means over pairs of different cases (Gretton et al. 2012, eq. 3)."""
    n, m = between.shape
    own = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(own - 2 * between.mean())


def kernel_distance(samples: Matrix, reference: Matrix, *, subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """Kernel distance (KID) of two sets of standardised features, unbiased at any number of cases.

    k(x, y) = (x . y / D + 1)^3, squared maximum mean discrepancy. 0 on average for sets of one distribution, then as
    often below as above.

    Args:
        samples: (N, D), N >= 2.
        reference: (M, D), M >= 2.
        subsets: random halves that give the spread.
        seed: of the halves.

    Returns:
        Distance of the whole sets, and its standard deviation over pairs of random halves (NaN below four cases), which
        vary more than whole sets.

    Raises:
        ValueError: on fewer than two cases.

    References:
        Binkowski et al., Demystifying MMD GANs, ICLR 2018.
    """
    if min(len(samples), len(reference)) < 2:
        raise ValueError(f"kernel_distance: two cases of each set are needed, got {len(samples)} and {len(reference)}")
    xx, yy, xy = (
        (a @ b.T / samples.shape[1] + 1) ** 3
        for a, b in ((samples, samples), (reference, reference), (samples, reference))
    )
    rng, halves = np.random.default_rng(seed), []
    n, m = len(samples) // 2, len(reference) // 2
    for _ in range(subsets if min(n, m) >= 2 else 0):
        i, j = (rng.choice(total, size, replace=False) for total, size in ((len(xx), n), (len(yy), m)))
        halves.append(_squared_discrepancy(xx[np.ix_(i, i)], yy[np.ix_(j, j)], xy[np.ix_(i, j)]))
    return _squared_discrepancy(xx, yy, xy), float(np.std(halves, ddof=1)) if len(halves) > 1 else float("nan")


def frechet_distance(samples: Matrix, reference: Matrix) -> float:
    """Frechet distance of Gaussians fitted to two sets of features, by MONAI, where the sets are large enough for one.

    Args:
        samples, reference: (N, D) and (M, D), with twice as many cases as features at least.

    Raises:
        ValueError: on fewer cases: the covariances are then not known, and the distance grows as cases get fewer.

    References:
        Heusel et al., GANs trained by a two time-scale update rule, NeurIPS 2017.
    """
    needed = 2 * samples.shape[1]
    if min(len(samples), len(reference)) < needed:
        raise ValueError(
            f"frechet_distance: {samples.shape[1]} features need {needed} cases in each set, got {len(samples)} and "
            f"{len(reference)}; use kernel_distance, which is unbiased at any number"
        )
    return float(get_fid_score(torch.as_tensor(samples), torch.as_tensor(reference)))


def _nearest(samples: Matrix, others: Matrix) -> NDArray[np.float64]:
    """Distance of each case to the nearest of others; of the same matrix, to the nearest but itself."""
    distances = cdist(samples, others)
    if samples is others:
        np.fill_diagonal(distances, np.inf)
    return distances.min(1)


def distance_ratios(samples: Matrix, training: Matrix, held_out: Matrix) -> NDArray[np.float64]:
    """Distance to the nearest training case over that to the nearest held-out case. Ours.

    Copies of training cases are far below 1. What is as near to the one as to the other is at 1 only if both sets are
    equally large: of more training cases one is nearer by chance. So compare with the ratios of the held-out cases
    themselves, `distance_ratios(held_out, training, held_out)`, which leaves each case itself out.

    Args:
        samples, training, held_out: (N, D), standardised alike; two held-out cases at least for their own ratios.

    Returns:
        (N,); infinite for a copy of a held-out case, NaN for one of both.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return _nearest(samples, training) / _nearest(samples, held_out)


def copying_p_value(samples: Matrix, training: Matrix, held_out: Matrix) -> float:
    """Probability that samples would be so much nearer to the training cases than held-out cases are, if not copied.

    One-sided Mann-Whitney test of the distances to the nearest training case. Samples made from templates of the
    training set share their contrast and are nearer without being copies: a small value asks for a look, no more.

    Args:
        samples, training, held_out: (N, D), standardised alike.

    References:
        Meehan et al., A non-parametric test to detect data-copying in generative models, AISTATS 2020.
    """
    return float(mannwhitneyu(_nearest(samples, training), _nearest(held_out, training), alternative="less").pvalue)


def ms_ssim(image: NDArray, other: NDArray) -> float:
    """Multi-scale structural similarity of two volumes with values in [0, 1], by MONAI: 1 for equal ones.

    Four scales and windows of 7 voxels, so that volumes of 64 voxels can be compared.

    Raises:
        ValueError: on volumes of fewer than 63 voxels along an axis.

    References:
        Wang et al., Multiscale structural similarity for image quality assessment, Asilomar 2003.
    """
    if min(*image.shape, *other.shape) < 63:
        raise ValueError(f"ms_ssim: four scales need 63 voxels along each axis, got {image.shape} and {other.shape}")
    x, y = (torch.as_tensor(np.asarray(v, dtype=np.float32))[None, None] for v in (image, other))
    return float(compute_ms_ssim(x, y, spatial_dims=3, kernel_size=7, weights=_SCALE_WEIGHTS))


def local_correlation(image: NDArray, other: NDArray, inside: NDArray) -> float:
    """Mean of the normalised cross-correlation of two volumes in windows of 9 voxels around voxels inside.

    1 for copies, whatever their contrast; about 0 for unrelated volumes. It does not see copies that are turned,
    mirrored or deformed. Flat windows count as uncorrelated.

    Args:
        image, other: (H, W, D) with values in [0, 1], aligned.
        inside: (H, W, D), non-zero where to look; NaN if it is nowhere.
    """
    region = np.asarray(inside).astype(bool)
    if not region.any():
        return float("nan")
    a, b = (np.asarray(v, dtype=np.float64) for v in (image, other))
    mean_a, mean_b, aa, bb, ab = (ndimage.uniform_filter(v, 9, mode="nearest") for v in (a, b, a * a, b * b, a * b))
    spread = (aa - mean_a**2 + _NO_TEXTURE) * (bb - mean_b**2 + _NO_TEXTURE)
    return float(((ab - mean_a * mean_b) / np.sqrt(spread))[region].mean())
