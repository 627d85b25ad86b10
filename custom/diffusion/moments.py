"""Mean and deviation of the residual in every voxel, as mask and template tell them (ours)."""

from __future__ import annotations

from math import pi

import torch
from custom.diffusion.context import MODES, RESIDUAL_UNIT_HU, Context
from custom.volumes.haar import depth_to_space, haar_pack, haar_unpack, space_to_depth
from custom.volumes.intensity import LUNG_BELOW_HU
from torch import nn
from torch.nn import functional as F

REGIONS = ("soft_background", "lung", "interior", "background_edge", "label_edge_inside", "label_edge_outside")
MIN_SIGMA = 0.01
"""Lower limit of the table of deviations, in its unit."""
SD_OVER_MEAN_ABSOLUTE = (pi / 2) ** 0.5
"""Standard deviation of a Gaussian over its mean absolute value."""
_EDGE_RANGE_HU = 100.0  # ours: above the noise of a scan, below the step from fat to muscle
_MIN_UNIT_HU = 5.0  # ours: quieter than any scan; keeps the unit of a noise-free image from 0
_LOG_RANGE = 3.0  # ours: the network changes the table by a factor of 20 (e^3) at most
_HIDDEN_CHANNELS = 24  # ours: as wide as the encoded condition
_TRACKING = 0.02  # ours: the table follows within some fifty iterations
_MAX_RATIO = 5.0  # ours: one wild batch raises the table by 8 % at most


def _on_boundary(label: torch.Tensor) -> torch.Tensor:
    """1 where a voxel of (B, 1, H, W, D) or a face neighbour of it has another label, else 0; float."""
    boundary = torch.zeros_like(label)
    for axis in (2, 3, 4):
        size = label.shape[axis] - 1
        differs = (label.narrow(axis, 1, size) != label.narrow(axis, 0, size)).to(label.dtype)
        boundary.narrow(axis, 1, size).add_(differs)
        boundary.narrow(axis, 0, size).add_(differs)
    return boundary


def label_edges(target_label: torch.Tensor) -> torch.Tensor:
    """Packed voxels whose block holds a face between two labels.

    Args:
        target_label: (B, 1, H, W, D), even sizes.

    Returns:
        (B, 1, h, w, d) bool.
    """
    return F.max_pool3d(_on_boundary(target_label), 2) > 0


def residual_regions(target_label: torch.Tensor, prior_hu: torch.Tensor) -> torch.Tensor:
    """Region index (see REGIONS) of every packed voxel and channel of the local basis (ours).

    The residual is small and noise-like inside a label, large where labels meet (partial volume), different again in
    the background, whose prior is a warped image: soft tissue, lung, and where that image has edges that may be
    misplaced. Where labels meet, voxels inside and outside the labels are told apart.

    Args:
        target_label, prior_hu: (B, 1, H, W, D), even sizes.

    Returns:
        (B, 8, h, w, d) int64.
    """
    interior = F.max_pool3d(target_label, 2) > 0
    prior = F.avg_pool3d(prior_hu, 2)
    contrast = F.max_pool3d(prior, 3, 1, 1) + F.max_pool3d(-prior, 3, 1, 1)
    background = torch.where(contrast > _EDGE_RANGE_HU, 3, torch.where(prior < LUNG_BELOW_HU, 1, 0))
    voxels = torch.where(space_to_depth(target_label) > 0, 4, 5)
    return torch.where(label_edges(target_label), voxels, torch.where(interior, 2, background))


def residual_unit(context: Context, region: torch.Tensor) -> torch.Tensor:
    """What the residual's standard deviation is proportional to, (B, 8, h, w, d) in units of the residual (ours).

    Away from edges the detail bands scale with the template's grain and the low-pass band with the painted label sd,
    so one table serves quiet and noisy scans. At edges the unit is 1; made proportional to the local contrast of the
    prior it fitted worse (docs/FINDINGS.md).

    Args:
        context: of even sizes.
        region: (B, 8, h, w, d), from :func:`residual_regions`.
    """
    spread, grain = F.avg_pool3d(context.spreads(), 2).clamp(min=_MIN_UNIT_HU).div(RESIDUAL_UNIT_HU).split(1, 1)
    away = torch.cat([spread, grain.expand(-1, 7, -1, -1, -1)], 1)
    return torch.where(region >= 3, torch.ones_like(away), away)


def to_local(bands: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Haar bands -> the basis in which the residual is nearest to independent: single voxels where labels meet (ours).

    Away from label edges grain has a spectrum, which bands describe. At a label edge one voxel is well known and its
    neighbour is not, which no band can say. Both bases are orthonormal in every block of 2x2x2 voxels, so white noise
    stays white.

    Args:
        bands: (B, 8, h, w, d) from :func:`custom.volumes.haar.haar_pack`.
        edge: (B, 1, h, w, d) bool, from :func:`label_edges`.
    """
    return torch.where(edge, space_to_depth(haar_unpack(bands)), bands)


def from_local(local: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`to_local`."""
    return torch.where(edge, haar_pack(depth_to_space(local)), local)


class ResidualMoments(nn.Module):
    """Mean and standard deviation of the packed residual in every voxel, given mask and template (ours).

    The deviation, in the local basis of :func:`to_local`, starts from a table measured on training pairs, by mode,
    region and channel, and is refined by a small network; the mean starts at 0. Edges blurred by the scanner, which
    painting leaves sharp, are predictable: a regression learns them in a fraction of the steps that the diffusion needs
    (docs/FINDINGS.md). Splitting off the mean is the idea of CorrDiff (Mardani et al. 2023); here mean, deviation and
    diffusion are trained together.

    Until :meth:`set_table` is called the mean is 0 and the deviation 1, which is plain diffusion of the residual.

    Args:
        feature_channels: channels of the encoded condition.
        image_channels: channels of the packed images.
        image_unit: residual units of one unit of the packed images, the scale of the linear part of the mean.
    """

    def __init__(self, feature_channels: int, image_channels: int, *, image_unit: float) -> None:
        super().__init__()
        width = _HIDDEN_CHANNELS
        self.hidden = nn.Sequential(
            nn.Conv3d(feature_channels + image_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv3d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv3d(width, 16, 3, padding=1),
        )
        self.linear = nn.Conv3d(image_channels, 8, 3, padding=1)
        for last in (self.hidden[-1], self.linear):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.image_unit = image_unit
        self.register_buffer("table", torch.ones(len(MODES), len(REGIONS), 8))
        self.register_buffer("measured", torch.tensor(False))
        self.table: torch.Tensor
        self.measured: torch.Tensor

    def set_table(self, table: torch.Tensor) -> None:
        """Set the measured standard deviations of the packed residual.

        Args:
            table: (modes, regions, 8), multiples of :func:`residual_unit`, > 0.

        Raises:
            ValueError: on another shape or values that are not finite and positive.
        """
        if table.shape != self.table.shape or not bool((table.isfinite() & (table > 0)).all()):
            raise ValueError(
                f"table: must be finite, positive and shaped {tuple(self.table.shape)}, "
                f"got {tuple(table.shape)} with minimum {float(table.min()):g}"
            )
        self.table.copy_(table)
        self.measured.fill_(True)

    def cells(self, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Index into the flattened table and unit, each (B, 8, h, w, d), of a context of even sizes."""
        region = residual_regions(context.target_label, context.prior_hu)
        mode = context.modes().view(-1, 1, 1, 1, 1)
        channel = torch.arange(8, device=region.device).view(1, -1, 1, 1, 1)
        return (mode * len(REGIONS) + region) * 8 + channel, residual_unit(context, region)

    @torch.no_grad()
    def absolute_sums(self, values: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of |values| (B, 8, h, w, d) and their number per cell of the table, each (modes, regions, 8)."""
        total = torch.zeros(self.table.numel(), 2, dtype=torch.float64, device=values.device)
        sizes = values.double().abs()
        total.index_add_(0, cell.flatten(), torch.stack([sizes, torch.ones_like(sizes)], -1).reshape(-1, 2))
        return total[:, 0].view_as(self.table), total[:, 1].view_as(self.table)

    @torch.no_grad()
    def track(self, standardised: torch.Tensor, context: Context) -> None:
        """Let the table follow the mean, which explains ever more of the residual, by a moving average.

        Args:
            standardised: (B, 8, h, w, d), (residual - mean) / deviation in the local basis.
            context: of (B, 1, 2h, 2w, 2d).
        """
        sums, count = self.absolute_sums(standardised, self.cells(context)[0])
        ratio = torch.where(count > 0, SD_OVER_MEAN_ABSOLUTE * sums / count, 1.0).float().clamp(max=_MAX_RATIO)
        self.table.mul_(1 + _TRACKING * (ratio - 1)).clamp_(min=MIN_SIGMA)

    def forward(
        self, features: torch.Tensor, images: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments of the packed residual.

        Args:
            features: (B, C, h, w, d) encoded condition.
            images: (B, I, h, w, d) packed images.
            context: of (B, 1, 2h, 2w, 2d).

        Returns:
            mean, in Haar bands, and standard deviation, in the local basis, each (B, 8, h, w, d).
        """
        correction, log_factor = self.hidden(torch.cat([features, images], 1)).float().chunk(2, 1)
        # In single voxels the mean is learned faster than in bands.
        mean = haar_pack(depth_to_space(correction + self.image_unit * self.linear(images).float()))
        factor = (_LOG_RANGE * torch.tanh(log_factor / _LOG_RANGE)).exp()
        cell, unit = self.cells(context)
        deviation = self.table.flatten()[cell] * unit * factor
        return torch.where(self.measured, mean, 0.0), torch.where(self.measured, deviation, 1.0)
