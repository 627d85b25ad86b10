"""The StructDiff network, a template-guided diffusion U-Net computed on Haar-packed volumes.

Independent implementation from the abstract of StructDiff (arXiv 2503.09560); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from custom.diffusion.context import IMAGE_UNIT_HU, RESIDUAL_UNIT_HU, Context
from custom.diffusion.correspondence import CorrespondenceAttention
from custom.diffusion.formulas import amplitudes, precondition
from custom.diffusion.moments import ResidualMoments, from_local, label_edges, to_local
from custom.runs.options import check_options
from custom.volumes.grids import crop_to, pad_to, pad_to_multiple
from custom.volumes.haar import haar_pack, haar_unpack
from custom.volumes.haar import space_to_depth as pack_blocks
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.nn import functional as F

_IMAGE_CHANNELS = 18  # Haar bands of template and prior, painted sd and grain


class Condition(NamedTuple):
    """What does not depend on time: encoded once per volume (or window), used at every step.

    Attributes:
        features: (B, C, h, w, d) on the packed grid.
        mean: (B, 8, h, w, d) mean of the packed residual, in Haar bands.
        sigma: (B, 8, h, w, d) its standard deviation, in the local basis of `custom.diffusion.moments.to_local`.
        edge: (B, 1, h, w, d) where that basis is single voxels.
    """

    features: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor
    edge: torch.Tensor


class Prediction(NamedTuple):
    """What the network hands to the loss: a velocity, and the moments that it comes from, of one encoding.

    Attributes:
        velocity: (B, 1, H, W, D) of the scaled residual.
        mean, sigma, edge: as of :class:`Condition`, on its padded grid.
        spread: (B, 8, h, w, d) expected deviation c_out of the velocity, in the local basis; without gradient.
        affinity: (B, tokens, tokens) logits of the correspondence attention, where the network has one.
    """

    velocity: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor
    edge: torch.Tensor
    spread: torch.Tensor
    affinity: torch.Tensor | None


def one_hot_blocks(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """(B, 1, H, W, D) ids -> (B, 8 num_labels, H/2, W/2, D/2) packed one-hot; ids outside the range give zeros."""
    ids = torch.arange(num_labels, device=label.device).view(1, -1, 1, 1, 1)
    return pack_blocks((label.round() == ids).float())


class TracedNetwork(nn.Module):
    """What `torch.jit.script` compiles in place of a `StructDiffUNet`: its forward, traced once, valid at all sizes.

    Args:
        network: in evaluation mode, on any device.
    """

    def __init__(self, network: StructDiffUNet) -> None:
        super().__init__()
        device = network.alphas_cumprod.device
        # A size that needs padding and a batch of two: tracing leaves out branches that are not taken.
        size = (network.size_multiple + 1,) * 3
        image = torch.zeros(2, 1, *size, device=device)
        context = torch.zeros(2, len(Context._fields), *size, device=device)
        timesteps = torch.zeros(2, dtype=torch.int64, device=device)
        self.traced = torch.jit.trace(network, (image, timesteps, context))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """As `StructDiffUNet.forward`, without its checks."""
        return self.traced(x, timesteps, context)


class StructDiffUNet(nn.Module):
    """Predicts the velocity of the scaled residual (image - prior) / scale of a CT volume, guided by mask and template.

    Voxels in, voxels out; inside, MONAI's `DiffusionModelUNet` runs on the Haar-packed grid. What is known of the
    residual without it, mean and deviation in every voxel (`moments`), enters analytically, so that it only has to
    learn what a Gaussian of these moments lacks.

    Args:
        num_labels: label ids 0 to num_labels - 1, background included.
        channels: channels of each U-Net level.
        num_res_blocks: residual blocks of each level.
        condition_channels: width of the encoded condition.
        correspondence_channels: width of the correspondence attention; 0 leaves it out.
        norm_num_groups: groups of every group norm; divides all `channels`.
        num_train_timesteps: length of the cosine training schedule.
        amp: bf16 autocast inside the network. Never chosen by what a processor can do: results would depend on it.

    Raises:
        ValueError: when `num_labels` is below 2, or a width is out of range.
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
        amp: bool = False,
    ) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"num_labels: background and at least one label are needed, got {num_labels}")
        sizes = {"channels": channels, "num_res_blocks": num_res_blocks, "condition_channels": condition_channels}
        sizes["correspondence_channels"] = correspondence_channels
        check_options([], resolved={f"network_def#{name}": value for name, value in sizes.items()})
        if any(width % norm_num_groups for width in channels):
            raise ValueError(
                f"network_def#channels: must be multiples of norm_num_groups, {norm_num_groups}, got {list(channels)}; "
                f"for example [{norm_num_groups}, {2 * norm_num_groups}]"
            )
        self.num_labels, self.amp = num_labels, amp
        self.size_multiple = max(2 ** len(channels), CorrespondenceAttention.stride if correspondence_channels else 2)
        self.condition_encoder = nn.Sequential(
            nn.Conv3d(16 * num_labels + _IMAGE_CHANNELS, condition_channels, 1),
            nn.SiLU(),
            nn.Conv3d(condition_channels, condition_channels, 3, padding=1),
        )
        self.moments = ResidualMoments(condition_channels, _IMAGE_CHANNELS, image_unit=IMAGE_UNIT_HU / RESIDUAL_UNIT_HU)
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
        self.alphas_cumprod: torch.Tensor

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.amp)

    def encode(self, context: torch.Tensor) -> Condition:
        """Encode what does not depend on time.

        Args:
            context: (B, 6, H, W, D), see :class:`custom.diffusion.context.Context`; any size.

        Returns:
            the condition on the padded packed grid.

        Raises:
            ValueError: on another number of axes or channels.
        """
        return self._encode(Context.of(pad_to_multiple(context.float(), self.size_multiple)))[0]

    def _encode(self, context: Context) -> tuple[Condition, torch.Tensor | None]:
        """Condition of a padded context, and the affinity of the correspondence attention, if any."""
        affinity = None
        with self._autocast(context.prior_hu.device):
            spreads = F.avg_pool3d(context.spreads() / RESIDUAL_UNIT_HU, 2)
            images = torch.cat([haar_pack(context.images() / IMAGE_UNIT_HU), spreads], 1)
            masks = [one_hot_blocks(ids, self.num_labels) for ids in (context.target_label, context.template_label)]
            encoded = self.condition_encoder(torch.cat([*masks, images], 1))
            mean, sigma = self.moments(encoded, images, context)
            # The images also reach the U-Net unencoded: residuals at edges are learned several times faster so
            # (docs/FINDINGS.md).
            features = torch.cat([encoded, images], 1)
            if self.correspondence is not None:
                attended, affinity = self.correspondence(context)
                features = torch.cat([features, attended], 1)
        return Condition(features.float(), mean, sigma, label_edges(context.target_label)), affinity

    def flow(self, y: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """F, the change of the preconditioned packed sample y with its angle (see `custom.diffusion.formulas.angle`).

        Args:
            y: (B, 8, h, w, d) Haar bands, of unit variance at every time.
            timesteps: (B,) times.
            features: (B, C, h', w', d') of the condition, at least as large as y.

        Returns:
            (B, 8, h, w, d) Haar bands.
        """
        padded = pad_to(y, features.shape[2:])
        with self._autocast(y.device):
            return crop_to(self.unet(torch.cat([padded, features], 1), timesteps), y.shape[2:]).float()

    def denoise(self, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Velocity of the noisy scaled residual x (B, 1, H, W, D) at timesteps (B,), given an encoded condition.

        With the moments mean and sigma of x0 (detached: they are trained by their own likelihood):
        v = c_skip (x - a mean) - s mean + c_out F(c_in (x - a mean)), where c and F act in the local basis.
        """
        mean, sigma, edge = condition.mean.detach(), condition.sigma.detach(), condition.edge
        packed = haar_pack(pad_to_multiple(x.float(), self.size_multiple))
        a, s = amplitudes(self.alphas_cumprod, timesteps, packed.ndim)
        c_in, c_skip, c_out = precondition(a, s, sigma)
        centred = to_local(packed - a * mean, edge)
        f = to_local(self.flow(from_local(c_in * centred, edge), timesteps, condition.features), edge)
        velocity = from_local(c_skip * centred + c_out * f, edge) - s * mean
        return crop_to(haar_unpack(velocity), x.shape[2:])

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        with_moments: bool = False,
    ) -> torch.Tensor | Prediction:
        """Predict the velocity.

        Args:
            x: (B, 1, H, W, D) noisy scaled residual, any size.
            timesteps: (B,) int64; None is the last, noisiest time.
            context: (B, 6, H, W, D), see :meth:`encode`; None is unconditional.
            with_moments: hand the moments on as well, as the loss needs them.

        Returns:
            (B, 1, H, W, D) velocity a eps - s x0, or a :class:`Prediction`.

        Raises:
            ValueError: when x and context differ in batch or spatial size, or the context is malformed.
        """
        if timesteps is None:
            timesteps = torch.full((len(x),), len(self.alphas_cumprod) - 1, device=x.device)
        if context is None:
            context = Context.absent(x).stacked()
        if x.shape[2:] != context.shape[2:] or len(x) != len(context):
            raise ValueError(
                f"x {tuple(x.shape)} and context {tuple(context.shape)}: batch and spatial sizes must agree"
            )
        condition, affinity = self._encode(Context.of(pad_to_multiple(context.float(), self.size_multiple)))
        velocity = self.denoise(x, timesteps, condition)
        if not with_moments:
            return velocity
        _, mean, sigma, edge = condition
        a, s = amplitudes(self.alphas_cumprod, timesteps, sigma.ndim)
        return Prediction(velocity, mean, sigma, edge, precondition(a, s, sigma.detach())[2], affinity)

    def __prepare_scriptable__(self) -> TracedNetwork:
        """Hook of `torch.jit.script`, which cannot compile autocast and generators: makes `ckpt_export` work."""
        return TracedNetwork(self)
