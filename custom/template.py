"""Layer 1: the template prior, what a template says about the image of a target mask before any network runs (ours).

Labels are painted with the template's mean HU of that label; the background is the aligned template image, with the
hole its heart leaves filled from the surroundings. Painted values are never blurred: a blurred prior loses thin
vessels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from skimage.restoration import denoise_tv_chambolle
from torch.nn import functional as F

from custom.diffusion import haar_pack, space_to_depth

_MIN_VOXELS = 8
_BACKGROUND_SIGMA_VOXELS = 0.8
_BORDER_VOXELS = 4
_SOFT_TISSUE_HU = (-300.0, 150.0)
_ROUND_OFF_HU = 1e-3


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
    table[count < _MIN_VOXELS] = torch.nan
    return table.float()


def fill_holes(image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Fill invalid voxels from around by pull-push: average valid voxels over growing blocks, interpolate back.

    Args:
        image: (B, 1, H, W, D).
        valid: same shape, bool; if nothing is valid the image comes back unchanged.

    Returns:
        (B, 1, H, W, D); valid voxels keep their value.
    """
    if bool(valid.all()) or not bool(valid.any()):
        return image
    blocks = [min(2, n) for n in image.shape[2:]]
    weight = F.avg_pool3d(valid.to(image.dtype), blocks, ceil_mode=True)
    coarse = F.avg_pool3d(image * valid, blocks, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = fill_holes(coarse, weight > 0)
    pushed = F.interpolate(coarse, image.shape[2:], mode="trilinear", align_corners=False)
    return torch.where(valid, image, pushed)


def template_background(template_hu: torch.Tensor, template_label: torch.Tensor) -> torch.Tensor:
    """The template without its heart and without its grain.

    Args:
        template_hu, template_label: (B, 1, H, W, D), aligned to the target.

    Returns:
        (B, 1, H, W, D) HU. The labelled region and the voxel around it (partial volume) are filled from the soft
        tissue outside: lung and unlabelled blood filled in too would leave the heart's outline (docs/FINDINGS.md).
        Where no soft tissue is outside, everything outside is used.
    """
    outside = F.max_pool3d((template_label > 0).float(), 3, 1, 1) == 0
    low, high = _SOFT_TISSUE_HU
    source = outside & (template_hu > low) & (template_hu < high)
    filled = torch.where(outside, template_hu, fill_holes(template_hu, source if bool(source.any()) else outside))
    # The filter pads with zeros: without the border repeated, air next to it would read -650 HU.
    padded = F.pad(filled, (_BORDER_VOXELS,) * 6, mode="replicate")
    inside = (..., *[slice(_BORDER_VOXELS, -_BORDER_VOXELS)] * 3)
    return GaussianFilter(3, _BACKGROUND_SIGMA_VOXELS)(padded)[inside]


def paint_prior(
    target_label: torch.Tensor, statistics: torch.Tensor, background_hu: torch.Tensor, background_sd_hu: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint label means and standard deviations on a target mask.

    Args:
        target_label: (B, 1, H, W, D) ids.
        statistics: (num_labels, 2) HU, finite; row 0 is not used.
        background_hu: (B, 1, H, W, D).
        background_sd_hu: standard deviation written outside the labels.

    Returns:
        prior and standard deviation, each (B, 1, H, W, D) HU.
    """
    ids = target_label.long()
    table = statistics.to(target_label.device)
    prior = torch.where(ids > 0, table[:, 0][ids.clamp(min=0)], background_hu)
    sd = torch.where(ids > 0, table[:, 1][ids.clamp(min=0)], torch.full_like(prior, background_sd_hu))
    return prior, sd


def fitted_template(
    template_hu: torch.Tensor,
    template_label: torch.Tensor,
    target_label: torch.Tensor,
    prior_hu: torch.Tensor,
    thin_labels: Sequence[int],
) -> torch.Tensor:
    """What a network may see of the aligned template image: where it shows another anatomy, the prior instead.

    That is where the labels of template and target differ, at the thin labels of the target, and within two voxels of
    those of the template. Vessels of another heart lie elsewhere; a network trained on pairs of one heart copies what
    it sees there, and draws no vessel where the template has none (docs/FINDINGS.md).

    Args:
        template_hu, template_label, target_label, prior_hu: (B, 1, H, W, D), on one grid.
        thin_labels: ids of thin structures.

    Returns:
        (B, 1, H, W, D) HU.
    """
    thin = torch.tensor(list(thin_labels), dtype=target_label.dtype)
    own = F.max_pool3d(torch.isin(template_label.round(), thin).float(), 5, 1, 2) > 0
    differs = template_label.round() != target_label.round()
    return torch.where(own | differs | torch.isin(target_label.round(), thin), prior_hu, template_hu)


def complete_statistics(statistics: torch.Tensor, nominal_hu: Sequence[float]) -> tuple[torch.Tensor, list[int]]:
    """Replace the statistics of labels the template does not show by nominal ones.

    The nominal mean is shifted by the median difference between the template and the nominal table over the labels that
    are present, so that a missing chamber follows the contrast phase; the sd is the median sd.

    Args:
        statistics: (num_labels, 2) HU, NaN for absent labels.
        nominal_hu: plausible mean of every label, background first.

    Returns:
        finite (num_labels, 2) and the ids that were filled in.

    Raises:
        ValueError: when the lengths differ.
    """
    if len(nominal_hu) != len(statistics):
        raise ValueError(
            f"nominal_hu: one value for each of the {len(statistics)} labels is needed, got {len(nominal_hu)}"
        )
    nominal = torch.tensor(nominal_hu, dtype=torch.float32)
    absent = ~statistics[:, 0].isfinite()
    present = ~absent
    present[0] = False
    completed = statistics.clone()
    shift = (statistics[present, 0] - nominal[present]).median() if bool(present.any()) else torch.tensor(0.0)
    sd = statistics[present, 1].median() if bool(present.any()) else torch.tensor(0.0)
    completed[absent, 0] = nominal[absent] + shift
    completed[absent, 1] = sd
    return completed, absent.nonzero()[:, 0].tolist()


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
