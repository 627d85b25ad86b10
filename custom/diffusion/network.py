"""The StructDiff network: a template-guided diffusion of the structure of CT volumes, computed on Haar-packed volumes.

Independent implementation from the abstract of StructDiff (arXiv 2503.09560); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from custom.diffusion.context import IMAGE_UNIT_HU, RESIDUAL_UNIT_HU, Context
from custom.diffusion.formulas import amplitudes
from custom.runs.options import check_options
from custom.volumes.grids import crop_to, pad_to, pad_to_multiple
from custom.volumes.haar import depth_to_space, haar_pack, haar_unpack
from custom.volumes.haar import space_to_depth as pack_blocks
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.nn import functional as F

_IMAGE_CHANNELS = 16  # Haar bands of two images
SIGMA_RANGE = (0.01, 5.0)  # of the residual, 1 to 500 HU, ours: the step of images, and half that from lung to fat
_NEAR_BLOCKS, _FADING_BLOCKS = 4, 2  # of 2 x 2 x 2 voxels, ours: partial volume and neighbours of the heart lie within
_FIRST_SIGMA = 0.3  # where training starts, ours: about what edges leave to a mean


class Condition(NamedTuple):
    """What does not depend on time: made once per volume (or window), used at every step.

    Attributes:
        features: (B, C, h, w, d) on the packed grid: encoded masks and images, template, expected image.
        near: (B, 1, h, w, d) share of the residual that is drawn, see :func:`near_labels`.
        mean: (B, 8, h, w, d) mean of the residual, Haar bands in units of the residual.
        sigma: (B, 8, h, w, d) its standard deviation about that mean, alike.
    """

    features: torch.Tensor
    near: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor


class Prediction(NamedTuple):
    """What the loss compares, each (B, 8, h, w, d) Haar bands.

    Attributes:
        error, sigma: residual less its predicted mean, and predicted standard deviation.
        velocity, wanted: of the remainder, predicted and drawn; None while the moments are trained alone.
    """

    error: torch.Tensor
    sigma: torch.Tensor
    velocity: torch.Tensor | None = None
    wanted: torch.Tensor | None = None


def one_hot_blocks(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """(B, 1, H, W, D) ids -> (B, 8 num_labels, H/2, W/2, D/2) packed one-hot; ids outside the range give zeros."""
    ids = torch.arange(num_labels, device=label.device).view(1, -1, 1, 1, 1)
    return pack_blocks((label.round() == ids).float())


def near_labels(context: Context) -> torch.Tensor:
    """1 at labels of target and template and around them, 0 from 14 voxels on (ours).

    Far from the heart the mask asks for nothing: what the aligned template shows there is right as it is. Without a
    template nothing is known of anything, and the result is 1 everywhere.

    Args:
        context: of even sizes.

    Returns:
        (B, 1, h, w, d) on the packed grid.
    """
    labelled = ((context.target_label > 0) | (context.template_label > 0)).float()
    around = F.max_pool3d(F.max_pool3d(labelled, 2), 2 * _NEAR_BLOCKS + 1, 1, _NEAR_BLOCKS)
    near = F.avg_pool3d(F.pad(around, (_FADING_BLOCKS,) * 6, mode="replicate"), 2 * _FADING_BLOCKS + 1, 1)
    absent = context.template_label.flatten(1).amax(1) < 0
    return torch.where(absent.view(-1, 1, 1, 1, 1), 1.0, near)


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
    """Predicts the velocity of a CT's remainder: what mask, template and the mean that they tell leave open.

    The residual of an image to its prior has a mean and a standard deviation in every Haar band, which a regressor
    reads from mask and template. What is diffused is the standardised remainder z = (residual - mean) / sigma, so that
    the U-Net has to learn only what a Gaussian of these moments lacks. Splitting off a regressed mean is the idea of
    CorrDiff (Mardani et al. 2023). Both are MONAI's `DiffusionModelUNet`, on the packed grid.

    Args:
        num_labels: label ids 0 to num_labels - 1, background included.
        channels: channels of each level, of both networks.
        num_res_blocks: residual blocks of each level.
        condition_channels: width of the encoded masks and images.
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
        channels: Sequence[int] = (16, 32, 64),
        num_res_blocks: int = 1,
        condition_channels: int = 24,
        norm_num_groups: int = 8,
        num_train_timesteps: int = 1000,
        amp: bool = False,
    ) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"num_labels: background and at least one label are needed, got {num_labels}")
        sizes = {"channels": channels, "num_res_blocks": num_res_blocks, "condition_channels": condition_channels}
        check_options([], resolved={f"network_def#{name}": value for name, value in sizes.items()})
        if any(width % norm_num_groups for width in channels):
            raise ValueError(
                f"network_def#channels: must be multiples of norm_num_groups, {norm_num_groups}, got {list(channels)}; "
                f"for example [{norm_num_groups}, {2 * norm_num_groups}]"
            )
        self.num_labels, self.amp = num_labels, amp
        self.moments_only = False  # see `custom.diffusion.training.MomentsFirst`
        self.size_multiple = 2 ** len(channels)
        self.condition_encoder = nn.Sequential(
            nn.Conv3d(16 * num_labels + _IMAGE_CHANNELS, condition_channels, 1),
            nn.SiLU(),
            nn.Conv3d(condition_channels, condition_channels, 3, padding=1),
        )

        def unet(in_channels: int, out_channels: int) -> DiffusionModelUNet:
            return DiffusionModelUNet(
                spatial_dims=3,
                in_channels=in_channels,
                out_channels=out_channels,
                channels=tuple(channels),
                num_res_blocks=num_res_blocks,
                attention_levels=(False,) * len(channels),
                norm_num_groups=norm_num_groups,
            )

        seen = condition_channels + _IMAGE_CHANNELS
        self.regressor = unet(seen, 16)
        self.point_spread = nn.Conv3d(_IMAGE_CHANNELS, 8, 3, padding=1)
        nn.init.zeros_(self.point_spread.weight)
        nn.init.zeros_(self.point_spread.bias)  # type: ignore[arg-type]
        self.unet = unet(8 + seen, 8)
        schedule = DDPMScheduler(num_train_timesteps, schedule="cosine")
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod, persistent=False)
        self.alphas_cumprod: torch.Tensor

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As of any module.

        Raises:
            ValueError: for weights of version 0.3.0 and older, whose network was another.
        """
        if any(name.startswith("moments.") for name in state_dict):
            raise ValueError(
                "these weights were trained by version 0.3.0 or older, for another network; train anew, or download "
                "the bundle of this version"
            )
        return super().load_state_dict(state_dict, *args, **options)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.amp)

    def encode(self, context: torch.Tensor, near: torch.Tensor | None = None) -> Condition:
        """Encode what does not depend on time.

        Args:
            context: (B, 4, H, W, D), see :class:`custom.diffusion.context.Context`; any size.
            near: (B, 1, h, w, d) of :func:`near_labels`, for a window of a larger volume, whose labels may lie outside
                it; None finds it in the context itself.

        Returns:
            the condition on the padded packed grid.

        Raises:
            ValueError: on another number of axes or channels.
        """
        known = Context.of(pad_to_multiple(context.float(), self.size_multiple))
        with self._autocast(context.device):
            images = haar_pack(known.images() / IMAGE_UNIT_HU)
            masks = [one_hot_blocks(ids, self.num_labels) for ids in (known.target_label, known.template_label)]
            # The images also go on unencoded: residuals at edges are learned several times faster so
            # (docs/FINDINGS.md).
            encoded = self.condition_encoder(torch.cat([*masks, images], 1))
            seen = torch.cat([encoded, images], 1)
            # The shape, not `len`, which `torch.jit.trace` keeps as a number.
            at_no_time = torch.zeros(seen.shape[0], dtype=torch.int64, device=seen.device)
            voxels, spread = self.regressor(seen, at_no_time).float().chunk(2, 1)
            blurred = self.point_spread(images).float() * (IMAGE_UNIT_HU / RESIDUAL_UNIT_HU)
        # In single voxels the mean is learned faster than in bands.
        near = near_labels(known) if near is None else pad_to(near, seen.shape[2:])
        mean = near * haar_pack(depth_to_space(voxels + blurred))
        sigma = (near * _FIRST_SIGMA * spread.exp()).clamp(*SIGMA_RANGE)
        template, prior = images.chunk(2, 1)
        expected = prior + mean.detach() * (RESIDUAL_UNIT_HU / IMAGE_UNIT_HU)
        return Condition(torch.cat([encoded.float(), template, expected], 1), near, mean, sigma)

    def flow(self, y: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Velocity of the noisy packed remainder y, which is also its change with the angle (`formulas.angle_step`).

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

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor | Prediction:
        """Predict the velocity.

        Args:
            x: (B, 1, H, W, D) noisy remainder a z + s eps, of unit variance; with `residual` the noise eps alone. Any
                size.
            timesteps: (B,) int64; None is the last, noisiest time.
            context: (B, 4, H, W, D), see :meth:`encode`; None is unconditional.
            residual: (B, 1, H, W, D) in units of the residual, for training: the remainder is made here, since its
                moments are predicted.

        Returns:
            (B, 1, H, W, D) velocity a eps - s z, or a :class:`Prediction`.

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
        features, near, mean, sigma = self.encode(context)
        bands = haar_pack(pad_to_multiple(x.float(), self.size_multiple))
        if residual is None:
            return crop_to(haar_unpack(self.flow(bands, timesteps, features)), x.shape[2:])
        error = near * haar_pack(pad_to_multiple(residual.float(), self.size_multiple)) - mean
        if self.moments_only:
            return Prediction(error, sigma)
        remainder = error.detach() / sigma.detach()
        a, s = amplitudes(self.alphas_cumprod, timesteps, bands.ndim)
        velocity = self.flow(a * remainder + s * bands, timesteps, features)
        return Prediction(error, sigma, velocity, a * bands - s * remainder)

    def __prepare_scriptable__(self) -> TracedNetwork:
        """Hook of `torch.jit.script`, which cannot compile autocast and generators: makes `ckpt_export` work."""
        return TracedNetwork(self)
