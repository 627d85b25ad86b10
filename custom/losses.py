"""Layer 1: losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from custom.correspondence import CorrespondenceAttention
from custom.diffusion import at, corner, haar_pack, pad_to_multiple


class StructDiffLoss(_Loss):
    """Squared velocity error in units of its expected spread, heavier around thin labels (ours).

    The error is compared on the packed grid, where c_out differs by band and region: mean(w ((v - v*) / c_out)^2) /
    mean(w), with w = `thin_weight` in blocks within a voxel of a thin label and 1 elsewhere. With the attention
    given, its two-way consistency is added.

    Args:
        thin_labels: ids of thin structures; empty weighs all voxels alike.
        thin_weight: weight around them, at least 1.
        correspondence: the network's attention, or None.
        correspondence_weight: factor of its consistency term.

    Raises:
        ValueError: when `thin_weight` is below 1.
    """

    def __init__(
        self,
        *,
        thin_labels: Sequence[int] = (),
        thin_weight: float = 10.0,
        correspondence: CorrespondenceAttention | None = None,
        correspondence_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if thin_weight < 1:
            raise ValueError(f"thin_weight: must be at least 1, got {thin_weight}")
        self.thin_labels, self.thin_weight = list(thin_labels), thin_weight
        # Held in a tuple: the attention belongs to the network, whose parameters it must not list twice.
        self._correspondence = (correspondence,)
        self.correspondence_weight = correspondence_weight

    def weights(self, label: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W, D) ids, even sizes -> (B, 1, h, w, d) weights."""
        thin = torch.zeros_like(label, dtype=torch.float32)
        for index in self.thin_labels:
            thin = thin + (label == index)
        near = F.max_pool3d(F.pad(thin, (1,) * 6), 4, 2)
        return 1 + (self.thin_weight - 1) * near

    def forward(self, input: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of a batch.

        Args:
            input: predicted velocity (B, 1, H, W, D).
            target: `velocity` (B, 1, H, W, D), `output_scale` c_out (B, 8, h, w, d) on the padded packed grid, `label`
                (B, 1, H, W, D); with the attention also `context` (B, 6, H, W, D) and `image` (B, 1, H, W, D) HU.

        Returns:
            scalar.
        """
        scale = target["output_scale"]
        multiple = 2
        error = haar_pack(pad_to_multiple(input.float() - target["velocity"], multiple))
        weight = self.weights(pad_to_multiple(target["label"].float(), multiple))
        loss = (weight * (error / at(scale, corner(error.shape[2:]))) ** 2).mean() / weight.mean()
        attention = self._correspondence[0]
        if attention is None:
            return loss
        context = pad_to_multiple(target["context"].float(), attention.stride)
        image = pad_to_multiple(target["image"].float(), attention.stride)
        return loss + self.correspondence_weight * attention.consistency(context, image)
