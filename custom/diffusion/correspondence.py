"""Attention from target mask to template mask, an optional part of the network."""

from __future__ import annotations

import torch
from custom.diffusion.context import IMAGE_UNIT_HU, Context
from custom.volumes.haar import space_to_depth
from torch import nn
from torch.nn import functional as F


class CorrespondenceAttention(nn.Module):
    """Appearance of the target from the template by attention between their masks (ours, after the abstract).

    "Explicit knowledge of mask-to-image correspondence": queries come from the target mask, keys from the template
    mask, values from the template image. The same affinity read the other way round gives the reverse direction,
    which the loss uses ("bidirectional"). Works on a grid of 1/8 of the voxel resolution, where the whole volume fits
    in one attention.

    Args:
        num_labels: label ids 0 to num_labels - 1.
        channels: width of queries, keys, values and of the output.
    """

    stride = 8

    def __init__(self, num_labels: int, channels: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.mask_encoder = nn.Sequential(
            nn.Conv3d(num_labels + 3, channels, 3, padding=1), nn.SiLU(), nn.Conv3d(channels, channels, 1)
        )
        self.image_encoder = nn.Sequential(
            nn.Conv3d(8, channels, 3, padding=1), nn.SiLU(), nn.Conv3d(channels, channels, 1)
        )

    def _mask_tokens(self, label: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(self.num_labels, device=label.device).view(1, -1, 1, 1, 1)
        fractions = F.avg_pool3d((label.round() == ids).float(), self.stride)
        axes = [torch.linspace(-1, 1, n, device=label.device) for n in fractions.shape[2:]]
        position = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(label.shape[0], -1, -1, -1, -1)
        return self.mask_encoder(torch.cat([fractions, position], 1)).flatten(2).transpose(1, 2)

    def affinity(self, context: Context) -> torch.Tensor:
        """Scaled logits (B, target tokens, template tokens) of a context with every size divisible by 8."""
        query, key = self._mask_tokens(context.target_label), self._mask_tokens(context.template_label)
        return query @ key.transpose(1, 2) / query.shape[-1] ** 0.5

    @staticmethod
    def coarse(image_hu: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W, D) HU -> (B, 8, H/8, W/8, D/8) scaled block means."""
        return space_to_depth(F.avg_pool3d(image_hu / IMAGE_UNIT_HU, CorrespondenceAttention.stride // 2))

    def forward(self, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Attended features (B, channels, H/2, W/2, D/2) of a context, sizes divisible by 8, and the affinity."""
        image, logits = self.image_encoder(self.coarse(context.template_image_hu)), self.affinity(context)
        attended = logits.softmax(-1) @ image.flatten(2).transpose(1, 2)
        attended = attended.transpose(1, 2).reshape(image.shape)
        return F.interpolate(attended, scale_factor=self.stride // 2, mode="trilinear", align_corners=False), logits


def two_way_consistency(
    logits: torch.Tensor, template_image_hu: torch.Tensor, target_image_hu: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of carrying coarse intensities along an affinity, template to target and back; scalar.

    Args:
        logits: affinity (B, target tokens, template tokens) of :class:`CorrespondenceAttention`.
        template_image_hu, target_image_hu: (B, 1, H, W, D) of the size that the affinity is of.
    """
    template, target = (
        CorrespondenceAttention.coarse(image).flatten(2).transpose(1, 2)
        for image in (template_image_hu, target_image_hu)
    )
    forth = F.mse_loss(logits.softmax(-1) @ template, target)
    return forth + F.mse_loss(logits.transpose(1, 2).softmax(-1) @ target, template)
