"""The loss of the diffusion and of the residual's moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from custom.diffusion.context import Context
from custom.diffusion.correspondence import two_way_consistency
from custom.diffusion.moments import SD_OVER_MEAN_ABSOLUTE, to_local
from custom.diffusion.network import Prediction
from custom.volumes.grids import crop_to, pad_to, pad_to_multiple
from custom.volumes.haar import haar_pack
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss


def moments_loss(error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Voxelwise loss of a predicted mean, by its squared error over sigma, and of sigma, by the absolute error (ours).

        e^2 / (2 sg(sigma) sg(m)) + sqrt(pi / 2) |sg(e)| / sigma + log sigma

    with e = residual - mean, m = mean of sigma over the sample, sg = stop gradient. Gaussian likelihood weighs the mean
    by 1 / sigma^2 and so gives up where the error is large (Seitzer et al. 2022); here every sample counts alike. The
    absolute error gives the deviation of Gaussian data as well, but structures that the mean misses here and there do
    not raise the grain everywhere.

    Args:
        error, sigma: (B, C, h, w, d); sigma > 0.
    """
    scale = sigma.detach()
    level = scale.mean((1, 2, 3, 4), keepdim=True)
    return error.square() / (2 * scale * level) + SD_OVER_MEAN_ABSOLUTE * error.detach().abs() / sigma + sigma.log()


def centred_residual(prediction: Prediction, residual: torch.Tensor) -> torch.Tensor:
    """Residual (B, 1, H, W, D) less its predicted mean, in the local basis, (B, 8, h, w, d); odd sizes are padded."""
    packed = haar_pack(pad_to_multiple(residual, 2))
    mean, edge = (crop_to(part, packed.shape[2:]) for part in (prediction.mean, prediction.edge))
    return to_local(packed - mean, edge)


class StructDiffLoss(_Loss):
    """Loss of the diffusion and of the residual's moments, heavier around thin labels (ours).

    Diffusion: the squared velocity error in units of its expected spread c_out, compared in the local basis of
    `moments.to_local`. Moments: :func:`moments_loss`. Both are averaged with weights, `thin_weight` in blocks within a
    voxel of a thin label and 1 elsewhere. With correspondence attention in the network, its two-way consistency is
    added.

    Args:
        thin_labels: ids of thin structures; empty weighs all voxels alike.
        thin_weight: weight around them, at least 1.
        correspondence_weight: factor of the consistency term.

    Raises:
        ValueError: when `thin_weight` is below 1.
    """

    def __init__(
        self, *, thin_labels: Sequence[int] = (), thin_weight: float = 10.0, correspondence_weight: float = 0.1
    ) -> None:
        super().__init__()
        if thin_weight < 1:
            raise ValueError(f"thin_weight: must be at least 1, got {thin_weight}")
        self.thin_labels, self.thin_weight = list(thin_labels), thin_weight
        self.correspondence_weight = correspondence_weight

    def weights(self, label: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W, D) ids, even sizes -> (B, 1, h, w, d) weights."""
        thin = torch.zeros_like(label, dtype=torch.float32)
        for index in self.thin_labels:
            thin = thin + (label == index)
        near = F.max_pool3d(F.pad(thin, (1,) * 6), 4, 2)
        return 1 + (self.thin_weight - 1) * near

    def forward(self, input: Prediction, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of a batch.

        Args:
            input: what the network predicts `with_moments`.
            target: `velocity` and `residual` (B, 1, H, W, D) in residual units, `label` (B, 1, H, W, D) ids, and for
                the consistency term `context` (B, 6, H, W, D) and `image` (B, 1, H, W, D) HU.

        Returns:
            scalar.
        """
        weight = self.weights(pad_to_multiple(target["label"].float(), 2))
        sigma, edge, spread = (crop_to(part, weight.shape[2:]) for part in (input.sigma, input.edge, input.spread))
        velocity_error = pad_to_multiple(input.velocity.float() - target["velocity"], 2)
        error = to_local(haar_pack(velocity_error), edge) / spread
        centred = centred_residual(input, target["residual"])
        loss = (weight * (error.square() + moments_loss(centred, sigma))).mean() / weight.mean()
        if input.affinity is None:
            return loss
        whole = [2 * n for n in input.mean.shape[2:]]
        template = Context.of(pad_to(target["context"].float(), whole)).template_image_hu
        consistency = two_way_consistency(input.affinity.float(), template, pad_to(target["image"].float(), whole))
        return loss + self.correspondence_weight * consistency
