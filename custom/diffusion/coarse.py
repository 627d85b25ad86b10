"""The coarse stage: what no template shows is drawn as a whole, at 6 mm, before anything fine is (ours).

The fine network is local: it cannot invent a thorax. So a diffusion of the whole field, which is small at 6 mm, draws
the low-pass part of an image first, with the mask or without. It takes the place of the template in the prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from custom.diffusion.formulas import amplitudes, probability_flow
from custom.diffusion.noise import HU_RANGE
from custom.geometry.deformation import sample
from custom.volumes.grids import crop_to, pad_to_multiple, resample_cubic
from custom.volumes.haar import haar_pack, haar_unpack
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from scipy import ndimage
from torch import nn

CELL_MM = 6.0
"""Edge of a voxel of the coarse stage. Ours: a thorax is then some 32 voxels wide, seconds of a CPU."""
_BLUR_MM = 4.0  # ours, of the low-pass: 6 mm then hold it to 6 to 8 HU RMS on phantoms (3 mm: 14 to 17)
_MEAN_HU, _SD_HU = -250.0, 450.0  # of phantoms with lungs and air around, so that what is diffused has unit variance
_PAINT_UNIT_HU = 500.0
_MULTIPLE = 8  # of the three halvings of the network
_BAND_SD = (2.4, 0.4, 0.08, 0.02)  # of phantoms, by the number of axes along which a Haar band is the fine one
_FIELD_CELLS = 32  # 192 mm, ours: the field that is drawn at least, since the network was trained on that


def low_pass(image_hu: torch.Tensor, spacing_mm: Sequence[float]) -> torch.Tensor:
    """The part of an image that the coarse stage draws: blurred by a Gaussian of 4 mm, edge values outside.

    Args:
        image_hu: (1, C, H, W, D).
        spacing_mm: voxel size along each axis.
    """
    sigma = (0, 0, *(_BLUR_MM / s for s in spacing_mm))
    return torch.from_numpy(ndimage.gaussian_filter(image_hu.numpy(), sigma, mode="nearest", truncate=3.0))


def cells_over(size: Sequence[int], spacing_mm: Sequence[float]) -> list[int]:
    """Coarse voxels that cover a field of view: multiples of 8, and at least the 192 mm of training."""
    cells = [n * s / CELL_MM for n, s in zip(size, spacing_mm, strict=True)]
    return [max(_FIELD_CELLS, _MULTIPLE * math.ceil(n / _MULTIPLE)) for n in cells]


def cells_within(size: Sequence[int], spacing_mm: Sequence[float]) -> list[int]:
    """Coarse voxels that lie whole in a field of view."""
    return [int(n * s / CELL_MM + 1e-6) for n, s in zip(size, spacing_mm, strict=True)]


def coarsened(image_hu: torch.Tensor, spacing_mm: Sequence[float], cells: Sequence[int]) -> torch.Tensor:
    """The low-pass part of (1, 1, H, W, D) on a coarse grid of the same centre, (1, 1, *cells); edge values outside."""
    grids = zip(cells, image_hu.shape[2:], spacing_mm, strict=True)
    axes = [(torch.arange(m) - (m - 1) / 2) * (CELL_MM / s) + (n - 1) / 2 for m, n, s in grids]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].float()
    return sample(low_pass(image_hu, spacing_mm), where)


def refined(coarse_hu: torch.Tensor, size: Sequence[int], spacing_mm: Sequence[float]) -> torch.Tensor:
    """A coarse image (1, 1, h, w, d) on a fine grid of the same centre, (1, 1, *size), by cubic splines."""
    places = np.eye(4)
    for axis, (n, m, s) in enumerate(zip(size, coarse_hu.shape[2:], spacing_mm, strict=True)):
        places[axis, axis], places[axis, 3] = s / CELL_MM, ((m - 1) - (n - 1) * s / CELL_MM) / 2
    return resample_cubic(coarse_hu[0, 0], np.eye(4), places, size)[None, None]


def coarse_context(painted_hu: torch.Tensor | None, foreground: torch.Tensor) -> torch.Tensor:
    """What the coarse stage is told, (B, 2, h, w, d): the painted mask, and how much of a voxel is labelled.

    Args:
        painted_hu: (B, 1, h, w, d) low-pass of the painted mask; None is unconditional.
        foreground: (B, 1, h, w, d) low-pass of labelled or not; without a painted mask only its shape counts.
    """
    if painted_hu is None:
        return torch.cat([torch.zeros_like(foreground), torch.full_like(foreground, -1)], 1)
    return torch.cat([painted_hu / _PAINT_UNIT_HU, foreground], 1)


def standardised(coarse_hu: torch.Tensor) -> torch.Tensor:
    """What is diffused of a coarse image in HU, of about unit variance."""
    return (coarse_hu - _MEAN_HU) / _SD_HU


class CoarseUNet(nn.Module):
    """Predicts the velocity of a coarse image: MONAI's `DiffusionModelUNet`, told the painted mask beside it.

    As the fine network it works on Haar-packed volumes, which costs a fifth. It predicts what the best linear guess of
    every band leaves open, as Karras et al. (2022, table 1) do for a whole image: fine bands have a thousandth of the
    variance of the coarse one, and a network that has to learn such factors itself learns little else
    (docs/FINDINGS.md).

    Args:
        channels: of each level; attention on the last one lets the halves of a thorax agree.
        num_res_blocks: of each level.
        norm_num_groups: of every group norm; divides all `channels`.
        num_train_timesteps: length of the cosine training schedule.

    Raises:
        ValueError: when a width cannot be divided so.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (32, 64, 96),
        num_res_blocks: int = 1,
        norm_num_groups: int = 8,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        heads = 2 * norm_num_groups
        if any(width % norm_num_groups for width in channels) or channels[-1] % heads:
            raise ValueError(
                f"coarse_def#channels: must be multiples of norm_num_groups, {norm_num_groups}, and the last one of "
                f"{heads}, got {list(channels)}; for example [{norm_num_groups}, {heads}]"
            )
        self.size_multiple = 2 ** len(channels)
        self.unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=8 * 3,
            out_channels=8,
            channels=tuple(channels),
            num_res_blocks=num_res_blocks,
            attention_levels=(*[False] * (len(channels) - 1), True),
            num_head_channels=heads,
            norm_num_groups=norm_num_groups,
        )
        schedule = DDPMScheduler(num_train_timesteps, schedule="cosine")
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod, persistent=False)
        self.alphas_cumprod: torch.Tensor
        band_sd = torch.tensor([_BAND_SD[band.bit_count()] for band in range(8)])
        self.register_buffer("band_sd", band_sd.view(1, 8, 1, 1, 1), persistent=False)
        self.band_sd: torch.Tensor

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor | None = None, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Velocity a eps - s z of a noisy standardised image a z + s eps.

        Args:
            x: (B, 1, h, w, d), any size.
            timesteps: (B,) int64; None is the last, noisiest time.
            context: (B, 2, h, w, d) of :func:`coarse_context`; None is unconditional.
        """
        if timesteps is None:
            timesteps = torch.full((len(x),), len(self.alphas_cumprod) - 1, device=x.device)
        if context is None:
            context = coarse_context(None, x)
        a, s = amplitudes(self.alphas_cumprod, timesteps, x.ndim)
        bands = haar_pack(pad_to_multiple(x, self.size_multiple))
        sd = (a**2 * self.band_sd**2 + s**2).sqrt()
        left_open = self.flow(bands / sd, timesteps, self.packed(context))
        velocity = a * s * (1 - self.band_sd**2) / sd**2 * bands + self.band_sd / sd * left_open
        return crop_to(haar_unpack(velocity), x.shape[2:])

    def packed(self, context: torch.Tensor) -> torch.Tensor:
        """Context as the network sees it, (B, 16, h', w', d')."""
        return haar_pack(pad_to_multiple(context, self.size_multiple))

    def flow(self, y: torch.Tensor, timesteps: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """Velocity of noisy bands, each of unit variance, which is also their change with their own angle.

        Args:
            y: (B, 8, h', w', d').
            timesteps: (B,) times.
            told: (B, 16, h', w', d') of :meth:`packed`.
        """
        return self.unet(torch.cat([y, told], 1), timesteps)

    @torch.no_grad()
    def draw(self, context: torch.Tensor, noise: torch.Tensor, times: Sequence[int]) -> torch.Tensor:
        """Coarse images (B, 1, h, w, d) in HU.

        Args:
            context: (B, 2, h, w, d).
            noise: (B, 1, h, w, d), standard normal.
            times: descending, of the network calls.
        """
        told, y = self.packed(context), haar_pack(pad_to_multiple(noise, self.size_multiple))
        y = probability_flow(y, lambda y, t: self.flow(y, t, told), self.alphas_cumprod, times, sd=self.band_sd)
        drawn = crop_to(haar_unpack(y * self.band_sd), noise.shape[2:])
        return (drawn * _SD_HU + _MEAN_HU).clamp(*HU_RANGE)
