"""The loss of the diffusion and of the residual's moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from custom.diffusion.network import Prediction
from custom.volumes.grids import crop_to, pad_to_multiple
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss


def label_edges(label: torch.Tensor) -> torch.Tensor:
    """Packed voxels whose block, or a face neighbour of it, holds a face between two labels.

    Args:
        label: (B, 1, H, W, D) ids, even sizes.

    Returns:
        (B, 1, h, w, d) bool.
    """
    lowest, highest = -F.max_pool3d(-label, 4, 2, 1), F.max_pool3d(label, 4, 2, 1)
    return highest > lowest


def moments_loss(error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Voxelwise loss of a predicted mean, by its squared error over sigma, and of sigma, by Gaussian likelihood (ours).

        e^2 / (2 sg(sigma) sg(m)) + sg(e)^2 / (2 sigma^2) + log sigma

    with e = residual - mean, m = mean of sigma over the sample, sg = stop gradient. Gaussian likelihood weighs the mean
    by 1 / sigma^2 and so gives up where the error is large (Seitzer et al. 2022); here every sample counts alike.

    Args:
        error, sigma: (B, C, h, w, d); sigma > 0.
    """
    scale = sigma.detach()
    level = scale.mean((1, 2, 3, 4), keepdim=True)
    return error.square() / (2 * scale * level) + error.detach().square() / (2 * sigma.square()) + sigma.log()


class StructDiffLoss(_Loss):
    """Loss of the diffusion and of the residual's moments, heavier where labels meet and around thin ones (ours).

    Diffusion: the squared velocity error. Moments: :func:`moments_loss`. Both are averaged with weights: `thin_weight`
    in blocks within a voxel of a thin label, `edge_weight` at other label edges, and 1 elsewhere.

    Args:
        thin_labels: ids of thin structures; empty weighs them as the others.
        thin_weight, edge_weight: at least 1.

    Raises:
        ValueError: when a weight is below 1.
    """

    def __init__(self, *, thin_labels: Sequence[int] = (), thin_weight: float = 10.0, edge_weight: float = 4.0) -> None:
        super().__init__()
        for name, weight in (("thin_weight", thin_weight), ("edge_weight", edge_weight)):
            if weight < 1:
                raise ValueError(f"{name}: must be at least 1, got {weight}")
        self.thin_labels, self.thin_weight, self.edge_weight = list(thin_labels), thin_weight, edge_weight

    def weights(self, label: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W, D) ids, even sizes -> (B, 1, h, w, d) weights."""
        thin = torch.isin(label.round(), torch.tensor(self.thin_labels, dtype=label.dtype, device=label.device))
        near = F.max_pool3d(thin.float(), 4, 2, 1) > 0
        weight = torch.where(label_edges(label), self.edge_weight, 1.0)
        return torch.where(near, weight.clamp(min=self.thin_weight), weight)

    def forward(self, input: Prediction, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of a batch.

        Args:
            input: what the network predicts of a `residual`.
            target: `label` (B, 1, H, W, D) ids.

        Returns:
            scalar.
        """
        weight = self.weights(pad_to_multiple(target["label"].float(), 2))
        error, sigma = (crop_to(part, weight.shape[2:]) for part in (input.error, input.sigma))
        loss = moments_loss(error, sigma)
        if input.velocity is not None and input.wanted is not None:
            loss = loss + crop_to((input.velocity - input.wanted).square(), weight.shape[2:])
        return (weight * loss).mean() / weight.mean()
