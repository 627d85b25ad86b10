"""The template prior, what a template says about the image of a target mask before any network runs (ours).

Labels are painted with the template's mean HU of that label; the background is the aligned template image, with the
hole its heart leaves filled from the surroundings. Painted values are never blurred: a blurred prior loses thin
vessels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from custom.volumes.intensity import label_statistics
from scipy import ndimage
from torch.nn import functional as F

_BED_MM = (2.0, 4.0)  # ours: the fat around coronaries is some millimetres thick
_JOINED_MM = 4.0  # ours: about what registration leaves between a vessel and the chamber it goes on from
_ENHANCED_HU = 200.0  # above it a voxel beside the heart is blood with contrast agent
_SOFT_TISSUE_HU = (-300.0, 150.0)  # from fat with partial volume to muscle and unenhanced blood


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


def bed_vessels(
    template_hu: torch.Tensor,
    template_label: torch.Tensor,
    target_label: torch.Tensor,
    thin_labels: Sequence[int],
    spacing_mm: Sequence[float],
) -> torch.Tensor:
    """Put soft tissue in place of a template's lung around the target's vessels: all of it to 2 mm, none from 4 mm on.

    Coronaries run in the fat on a heart. A template's heart has another shape, and where it is smaller its lung would
    lie against them: at 0.8 mm they lost 40 % of their HU to it (docs/FINDINGS.md).

    Args:
        template_hu, template_label, target_label: (1, 1, H, W, D), on one grid.
        thin_labels: ids of vessels.
        spacing_mm: voxel size along each axis.

    Returns:
        (1, 1, H, W, D) HU.
    """
    thin = torch.isin(target_label.round(), torch.tensor(list(thin_labels), dtype=target_label.dtype))
    unlabelled, (low, high) = template_label <= 0, _SOFT_TISSUE_HU
    soft = unlabelled & (template_hu > low) & (template_hu < high)
    if not bool(thin.any()) or not bool(soft.any()):
        return template_hu
    away_mm = torch.from_numpy(ndimage.distance_transform_edt(~thin[0, 0].numpy(), sampling=spacing_mm))
    share = ((_BED_MM[1] - away_mm) / (_BED_MM[1] - _BED_MM[0])).clamp(0, 1).float()[None, None]
    share = share * (unlabelled & (template_hu < low))
    return template_hu + share * (fill_holes(template_hu, soft) - template_hu) if bool(share.any()) else template_hu


def template_background(template_hu: torch.Tensor, template_label: torch.Tensor) -> torch.Tensor:
    """The template without its heart.

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
    return torch.where(outside, template_hu, fill_holes(template_hu, source if bool(source.any()) else outside))


def join_vessels(
    background_hu: torch.Tensor,
    template_hu: torch.Tensor,
    template_label: torch.Tensor,
    target_label: torch.Tensor,
    spacing_mm: Sequence[float],
) -> torch.Tensor:
    """Put blood back where a filled background cuts an unlabelled vessel off the label that it goes on from.

    :func:`template_background` fills the voxel around all labels as well. A line of fat would end the superior vena
    cava above the right atrium, and tell a segmenter, which no scan does, where the label ends. Other modes need it
    not: their network sees the template there.

    Args:
        background_hu: (1, 1, H, W, D) HU, filled.
        template_hu, template_label, target_label: on its grid.
        spacing_mm: voxel size along each axis.

    Returns:
        (1, 1, H, W, D) HU: the template where it shows enhanced blood, the target has no label, and both a label and
        unlabelled enhanced blood are within 4 mm.
    """
    outside = F.max_pool3d((template_label > 0).float(), 3, 1, 1) == 0
    enhanced, unlabelled = template_hu > _ENHANCED_HU, target_label <= 0
    size = [2 * round(_JOINED_MM / s) + 1 for s in spacing_mm]
    near = [
        torch.from_numpy(ndimage.maximum_filter(mask[0, 0].numpy(), size))[None, None]
        for mask in (outside & enhanced, ~unlabelled)
    ]
    return torch.where(~outside & enhanced & unlabelled & near[0] & near[1], template_hu, background_hu)


def paint_prior(target_label: torch.Tensor, means: torch.Tensor, background_hu: torch.Tensor) -> torch.Tensor:
    """Paint label means on a target mask.

    Args:
        target_label: (B, 1, H, W, D) ids.
        means: (num_labels,) HU; entry 0 is not used.
        background_hu: (B, 1, H, W, D).

    Returns:
        (B, 1, H, W, D) HU.
    """
    ids = target_label.long()
    return torch.where(ids > 0, means.to(target_label.device)[ids.clamp(min=0)], background_hu)


def with_label_means(image_hu: torch.Tensor, target_label: torch.Tensor, prior_hu: torch.Tensor) -> torch.Tensor:
    """Shift every label of an image so that its mean is the prior's (ours).

    The template says the mean of a label, and a network what is where in it: its moments are right voxel by voxel on
    average over all images, not in the mean of a label of one. Coronaries came out 38 HU too dark at 1.5 mm and 16 HU
    too bright at 0.8 mm so (docs/FINDINGS.md).

    Args:
        image_hu, target_label, prior_hu: (B, 1, H, W, D).

    Returns:
        (B, 1, H, W, D) HU; labels of fewer than 8 voxels and the background are as they were, and so is all where the
        prior is a constant, which tells no means.
    """
    ids = target_label.round().long().clamp(min=0)
    shifted = image_hu.clone()
    for image, at, prior in zip(shifted, ids, prior_hu, strict=True):
        if prior.min() == prior.max():
            continue
        off = label_statistics(image - prior, at, int(at.max()) + 1)[:, 0].nan_to_num(0.0)
        off[0] = 0.0
        image -= off[at]
    return shifted


def own_template(drawn_hu: torch.Tensor, target_label: torch.Tensor, prior_hu: torch.Tensor) -> torch.Tensor:
    """The prior that an image drawn without a template gives when it becomes its own template (ours).

    What the coarse stage drew is uneven inside labels as no scan is, and the network, which cannot tell what is wrong
    in it, keeps that. Painted anew, as a template's labels are, every label is even and has the mean that was drawn.

    Args:
        drawn_hu, target_label: (B, 1, H, W, D).
        prior_hu: of the drawing, (B, 1, H, W, D); stays at labels of fewer than 8 voxels.

    Returns:
        (B, 1, H, W, D) HU.
    """
    ids = target_label.round().long().clamp(min=0)
    backgrounds = template_background(drawn_hu, target_label)
    volumes = []
    for drawn, at, background, prior in zip(drawn_hu, ids, backgrounds, prior_hu, strict=True):
        means = label_statistics(drawn, at, int(at.max()) + 1)[:, 0]
        painted = paint_prior(at, means, background)
        volumes.append(torch.where(painted.isfinite(), painted, prior))
    return torch.stack(volumes)


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
