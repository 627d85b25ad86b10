"""Layer 1: the StructDiff network, a template-guided diffusion U-Net computed on Haar-packed volumes.

Independent implementation from the abstract of StructDiff (arXiv 2503.09560); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.nn import functional as F

from custom.correspondence import HU_UNIT, CorrespondenceAttention
from custom.diffusion import amplitudes, at, corner, haar_pack, haar_unpack, pad_to_multiple, precondition
from custom.diffusion import space_to_depth as pack_blocks

CONTEXT_CHANNELS = ("target_label", "template_image_hu", "template_label", "prior_hu", "prior_sd_hu", "grain_sd_hu")
"""Channels of `context`, in order. A dropped label map is -1 everywhere, a dropped template image is 0."""

MODES = ("template", "mask_only", "unconditional")
REGIONS = ("soft_background", "lung", "interior", "label_edge", "background_edge")
_LUNG_BELOW_HU = -400.0
_EDGE_RANGE_HU = 100.0
_MIN_UNIT_HU = 5.0
_IMAGE_CHANNELS = 18  # Haar bands of template and prior, painted sd and grain


class Condition(NamedTuple):
    """What does not depend on time: encoded once per volume (or window), used at every step.

    Attributes:
        features: (B, C, h, w, d) on the packed grid.
        sigma: (B, 8, h, w, d) standard deviation of the packed residual.
    """

    features: torch.Tensor
    sigma: torch.Tensor


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native to the device; emulated it is slower than fp32 (benchmarks/cost.py)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def one_hot_blocks(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """(B, 1, H, W, D) ids -> (B, 8 num_labels, H/2, W/2, D/2) packed one-hot; ids outside the range give zeros."""
    ids = torch.arange(num_labels, device=label.device).view(1, -1, 1, 1, 1)
    return pack_blocks((label.round() == ids).float())


def _on_boundary(label: torch.Tensor) -> torch.Tensor:
    """1 where a voxel of (B, 1, H, W, D) or a face neighbour of it has another label, else 0; float."""
    boundary = torch.zeros_like(label)
    for axis in (2, 3, 4):
        size = label.shape[axis] - 1
        differs = (label.narrow(axis, 1, size) != label.narrow(axis, 0, size)).to(label.dtype)
        boundary.narrow(axis, 1, size).add_(differs)
        boundary.narrow(axis, 0, size).add_(differs)
    return boundary


def residual_regions(target_label: torch.Tensor, prior_hu: torch.Tensor) -> torch.Tensor:
    """Region index (see REGIONS) of every packed voxel (ours).

    The residual is small and noise-like inside a label, large where labels meet (partial volume), different again in
    the background, whose prior is a warped image: soft tissue, lung, and where that image has edges that may be
    misplaced.

    Args:
        target_label, prior_hu: (B, 1, H, W, D), even sizes.

    Returns:
        (B, h, w, d) int64.
    """
    label_edge = F.max_pool3d(_on_boundary(target_label), 2) > 0
    interior = F.max_pool3d(target_label, 2) > 0
    prior = F.avg_pool3d(prior_hu, 2)
    spread = F.max_pool3d(prior, 3, 1, 1) + F.max_pool3d(-prior, 3, 1, 1)
    background = torch.where(spread > _EDGE_RANGE_HU, 4, torch.where(prior < _LUNG_BELOW_HU, 1, 0))
    return torch.where(label_edge, 3, torch.where(interior, 2, background))[:, 0]


def residual_unit(context: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """What the residual's standard deviation is proportional to, (B, 8, h, w, d) in units of 100 HU (ours).

    Away from edges the detail bands scale with the template's grain and the low-pass band with the painted label sd,
    so one table serves quiet and noisy scans. At edges it is contrast that counts: the unit is 1.

    Args:
        context: (B, 6, H, W, D), even sizes.
        region: (B, h, w, d), from :func:`residual_regions`.
    """
    spread, grain = F.avg_pool3d(context[:, 4:6], 2).clamp(min=_MIN_UNIT_HU).div(100).split(1, 1)
    unit = torch.cat([spread, grain.expand(-1, 7, -1, -1, -1)], 1)
    return torch.where((region >= 3)[:, None], torch.ones_like(unit), unit)


def context_modes(context: torch.Tensor) -> torch.Tensor:
    """(B,) index into MODES, read from which label maps were dropped (-1)."""
    no_target = context[:, 0].flatten(1).amax(1) < 0
    no_template = context[:, 2].flatten(1).amax(1) < 0
    return torch.where(no_target, 2, torch.where(no_template, 1, 0))


class StructDiffUNet(nn.Module):
    """Predicts the velocity of the scaled residual (image - prior) / scale of a CT volume, guided by mask and template.

    Voxels in, voxels out; inside, MONAI's `DiffusionModelUNet` runs on the Haar-packed grid with analytic
    preconditioning. Until :meth:`set_residual_sigma` is called, sigma is 1 everywhere, which is plain v-prediction.

    Args:
        num_labels: label ids 0 to num_labels - 1, background included.
        channels: channels of each U-Net level.
        num_res_blocks: residual blocks of each level.
        condition_channels: width of the encoded condition.
        correspondence_channels: width of the correspondence attention; 0 leaves it out.
        norm_num_groups: groups of every group norm; divides all `channels`.
        num_train_timesteps: length of the cosine training schedule.
        amp: bf16 autocast inside the network; None switches it on where the device has native bf16.

    Raises:
        ValueError: when `num_labels` is below 2.
    """

    def __init__(
        self,
        *,
        num_labels: int,
        channels: Sequence[int] = (32, 64, 96),
        num_res_blocks: int = 1,
        condition_channels: int = 24,
        correspondence_channels: int = 0,
        norm_num_groups: int = 8,
        num_train_timesteps: int = 1000,
        amp: bool | None = None,
    ) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"num_labels: background and at least one label are needed, got {num_labels}")
        self.num_labels, self.amp = num_labels, amp
        self.size_multiple = max(2 ** len(channels), CorrespondenceAttention.stride if correspondence_channels else 2)
        self.condition_encoder = nn.Sequential(
            nn.Conv3d(16 * num_labels + _IMAGE_CHANNELS, condition_channels, 1),
            nn.SiLU(),
            nn.Conv3d(condition_channels, condition_channels, 3, padding=1),
        )
        self.correspondence = (
            CorrespondenceAttention(num_labels, correspondence_channels) if correspondence_channels else None
        )
        self.unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=8 + condition_channels + _IMAGE_CHANNELS + correspondence_channels,
            out_channels=8,
            channels=tuple(channels),
            num_res_blocks=num_res_blocks,
            attention_levels=(False,) * len(channels),
            norm_num_groups=norm_num_groups,
        )
        schedule = DDPMScheduler(num_train_timesteps, schedule="cosine")
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod, persistent=False)
        self.register_buffer("residual_sigma", torch.ones(len(MODES), len(REGIONS), 8))
        self.alphas_cumprod: torch.Tensor
        self.register_buffer("measured", torch.tensor(False))
        self.residual_sigma: torch.Tensor
        self.measured: torch.Tensor

    def set_residual_sigma(self, sigma: torch.Tensor) -> None:
        """Set the measured standard deviations of the packed residual.

        Args:
            sigma: (modes, regions, 8), multiples of :func:`residual_unit`, > 0.

        Raises:
            ValueError: on another shape or values that are not finite and positive.
        """
        if sigma.shape != self.residual_sigma.shape or not bool((sigma.isfinite() & (sigma > 0)).all()):
            raise ValueError(
                f"sigma: must be finite, positive and shaped {tuple(self.residual_sigma.shape)}, "
                f"got {tuple(sigma.shape)} with minimum {float(sigma.min()):g}"
            )
        self.residual_sigma.copy_(sigma)
        self.measured.fill_(True)

    def _check(self, context: torch.Tensor) -> None:
        if context.ndim != 5 or context.shape[1] != len(CONTEXT_CHANNELS):
            raise ValueError(
                f"context: must be (B, {len(CONTEXT_CHANNELS)}, H, W, D) with channels {CONTEXT_CHANNELS}, "
                f"got {tuple(context.shape)}"
            )

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = native_bf16(device) if self.amp is None else self.amp
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def sigma_map(self, context: torch.Tensor) -> torch.Tensor:
        """(B, 8, h, w, d) standard deviation of the packed residual of a context of even sizes."""
        region = residual_regions(context[:, :1], context[:, 3:4])
        table = self.residual_sigma[context_modes(context)]
        rows = torch.arange(len(context), device=context.device).view(-1, 1, 1, 1)
        sigma = table[rows, region].permute(0, 4, 1, 2, 3)
        return torch.where(self.measured, sigma * residual_unit(context, region), torch.ones_like(sigma))

    def encode(self, context: torch.Tensor) -> Condition:
        """Encode what does not depend on time.

        Args:
            context: (B, 6, H, W, D), channels as in CONTEXT_CHANNELS; labels as ids, images in HU; any size.

        Returns:
            the condition on the padded packed grid.

        Raises:
            ValueError: on another number of axes or channels.
        """
        self._check(context)
        context = pad_to_multiple(context.float(), self.size_multiple)
        sigma = self.sigma_map(context)
        with self._autocast(context.device):
            images = torch.cat([haar_pack(context[:, [1, 3]] / HU_UNIT), F.avg_pool3d(context[:, 4:6] / 100, 2)], 1)
            masks = [one_hot_blocks(context[:, channel : channel + 1], self.num_labels) for channel in (0, 2)]
            # The images also reach the U-Net unencoded: residuals at edges are learned several times faster so
            # (docs/FINDINGS.md).
            features = torch.cat([self.condition_encoder(torch.cat([*masks, images], 1)), images], 1)
            if self.correspondence is not None:
                features = torch.cat([features, self.correspondence(context)], 1)
        return Condition(features.float(), sigma)

    def denoise(self, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Velocity of the noisy scaled residual x (B, 1, H, W, D) at timesteps (B,), given an encoded condition."""
        packed = haar_pack(pad_to_multiple(x.float(), self.size_multiple))
        a, s = amplitudes(self.alphas_cumprod, timesteps, packed.ndim)
        c_in, c_skip, c_out = precondition(a, s, condition.sigma)
        with self._autocast(x.device):
            residual = self.unet(torch.cat([c_in * packed, condition.features], 1), timesteps)
        velocity = haar_unpack(c_skip * packed + c_out * residual.float())
        return at(velocity, corner(x.shape[2:]))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Predict the velocity.

        Args:
            x: (B, 1, H, W, D) noisy scaled residual, any size.
            timesteps: (B,) int64.
            context: (B, 6, H, W, D), see :meth:`encode`.

        Returns:
            (B, 1, H, W, D) velocity a eps - s x0.

        Raises:
            ValueError: when x and context differ in batch or spatial size, or the context is malformed.
        """
        if x.shape[2:] != context.shape[2:] or len(x) != len(context):
            raise ValueError(
                f"x {tuple(x.shape)} and context {tuple(context.shape)}: batch and spatial sizes must agree"
            )
        return self.denoise(x, timesteps, self.encode(context))


def output_scale(network: StructDiffUNet, context: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """c_out, (B, 8, h, w, d): the loss divides the velocity error by it, so every band and region counts alike."""
    sigma = network.sigma_map(pad_to_multiple(context.float(), network.size_multiple))
    a, s = amplitudes(network.alphas_cumprod, timesteps, sigma.ndim)
    return precondition(a, s, sigma)[2]
