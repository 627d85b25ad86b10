"""What the network is told about the image it has to draw: four channels, by name."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["IMAGE_UNIT_HU", "MODES", "RESIDUAL_UNIT_HU", "Context"]

MODES = ("template", "mask_only", "unconditional")
"""Guided by mask and template, by the mask alone, by nothing."""
RESIDUAL_UNIT_HU = 100.0
"""HU of one unit of the diffused residual, and of the spreads that the network reads. Ours: the order of both."""
IMAGE_UNIT_HU = 500.0
"""HU of one unit of the images that the network reads. Ours: about the range from fat to contrast-filled blood."""


class Context(NamedTuple):
    """The channels of `context` (B, 4, H, W, D), each (B, 1, H, W, D).

    Attributes:
        target_label: ids; -1 everywhere without a mask.
        template_image_hu: aligned to the target; 0 without a template.
        template_label: ids; -1 everywhere without a template.
        prior_hu: what mask and template say before any network runs.
    """

    target_label: torch.Tensor
    template_image_hu: torch.Tensor
    template_label: torch.Tensor
    prior_hu: torch.Tensor

    @classmethod
    def of(cls, channels: torch.Tensor) -> Context:
        """The channels of a tensor (B, 4, H, W, D), as views.

        Raises:
            ValueError: on another number of axes or channels.
        """
        if channels.ndim != 5 or channels.shape[1] != len(cls._fields):
            raise ValueError(
                f"context: must be (B, {len(cls._fields)}, H, W, D) with channels {cls._fields}, "
                f"got {tuple(channels.shape)}"
            )
        return cls(*channels.split(1, 1))

    @classmethod
    def absent(cls, like: torch.Tensor) -> Context:
        """Of an image that nothing is known of, on the grid of (B, 1, H, W, D): unconditional, at a prior of 0 HU."""
        nothing, dropped = torch.zeros_like(like), torch.full_like(like, -1)
        return cls(dropped, nothing, dropped, nothing)

    def stacked(self) -> torch.Tensor:
        """(B, 4, H, W, D), as the network takes it."""
        return torch.cat(self, 1)

    def images(self) -> torch.Tensor:
        """Template image and prior, (B, 2, H, W, D) HU."""
        return torch.cat([self.template_image_hu, self.prior_hu], 1)

    def modes(self) -> torch.Tensor:
        """(B,) index into MODES, read from which label maps are absent."""
        no_target = self.target_label.flatten(1).amax(1) < 0
        no_template = self.template_label.flatten(1).amax(1) < 0
        return torch.where(no_target, 2, torch.where(no_template, 1, 0))
