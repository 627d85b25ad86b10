"""Rendering whole volumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from custom.diffusion.context import MODES, RESIDUAL_UNIT_HU, Context
from custom.diffusion.formulas import probability_flow
from custom.diffusion.network import Condition, StructDiffUNet, near_labels
from custom.diffusion.noise import HU_RANGE, case_noise
from custom.diffusion.prior import own_template, with_label_means
from custom.diffusion.schedule import listed_timesteps
from custom.geometry.topology import bounding_box, grown_box
from custom.volumes.grids import crop, crop_to, pad_to_multiple
from custom.volumes.haar import haar_pack, haar_unpack
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer

Window = tuple[slice, ...]

_BOX_MARGIN = 4  # blocks of 2 x 2 x 2 voxels around what is drawn, ours: edges of a window are not seen in it


def _even(length: float) -> int:
    return max(2, 2 * math.ceil(length / 2 - 1e-9))


def windows_of(size: Sequence[int], roi_size: Sequence[int], overlap: float) -> list[Window]:
    """Overlapping windows that cover a volume; starts are even, so that all windows share one Haar grid.

    Args:
        size: (H, W, D) of the volume, even.
        roi_size: (H, W, D) of the largest window, even. Windows are as small as their number allows.
        overlap: fraction of a window shared with the next, in [0, 1), or up to two voxels less.
    """
    counts = [math.ceil(max(n - r, 0) / (r * (1 - overlap))) for n, r in zip(size, roi_size, strict=True)]
    roi = [_even(n / (1 + count * (1 - overlap))) for n, count in zip(size, counts, strict=True)]
    return dense_patch_slices(list(size), roi, [_even(r * (1 - overlap)) for r in roi])


def drawn_box(near: torch.Tensor) -> Window:
    """The smallest box of the packed grid that holds all that is drawn, and a margin; everything where nothing is.

    Args:
        near: (B, 1, h, w, d) share that is drawn.
    """
    anywhere = (near.amax((0, 1)) > 0).cpu().numpy()
    if not anywhere.any():
        return tuple(slice(0, n) for n in anywhere.shape)
    box = grown_box(bounding_box(anywhere), [_BOX_MARGIN] * 3)
    return tuple(slice(part.start, min(part.stop, n)) for part, n in zip(box, anywhere.shape, strict=True))


class Encoded(NamedTuple):
    """What is known before the first step of what is drawn.

    Attributes:
        box: on the packed grid of the volume; all else of it is known without a network.
        windows: of the box, on its own packed grid.
        condition: index of a window -> what the network made of its context.
        mean, sigma: (B, 8, h, w, d) of the box.
        grid: (h, w, d) of the volume.
    """

    box: Window
    windows: list[Window]
    condition: Callable[[int], Condition]
    mean: torch.Tensor
    sigma: torch.Tensor
    grid: Sequence[int]

    def whole(self, part: torch.Tensor, outside: float = 0.0) -> torch.Tensor:
        """(B, C, h, w, d) of the box as one of the volume."""
        volume = part.new_full((*part.shape[:2], *self.grid), outside)
        crop(volume, self.box).copy_(part)
        return volume


def _scaled(window: Window, factor: float) -> Window:
    """A window on a grid of other voxels: 2 from the packed grid, 0.5 to it; starts and stops are even."""
    return tuple(slice(int(axis.start * factor), int(axis.stop * factor)) for axis in window)


def blended(
    predict: Callable[[int], torch.Tensor], windows: Sequence[tuple[slice, ...]], size: Sequence[int]
) -> torch.Tensor:
    """Average of overlapping window predictions, Gaussian-weighted towards window centres.

    Args:
        predict: index of the window -> prediction (B, C, h, w, d) there.
        windows: slices covering the volume; a single window is predicted as it is.
        size: (H, W, D) of the volume.
    """
    part = predict(0)
    if len(windows) == 1:
        return part
    total, weight = part.new_zeros(*part.shape[:2], *size), part.new_zeros(1, 1, *size)
    for index, window in enumerate(windows):
        part = predict(index) if index else part
        importance = compute_importance_map(tuple(part.shape[2:]), mode="gaussian", sigma_scale=0.2, device=part.device)
        importance = importance.clamp(min=1e-3)
        crop(total, window).add_(part * importance)
        crop(weight, window).add_(importance)
    return total / weight


class StructDiffInferer(Inferer):
    """Render HU volumes from contexts; large volumes by windows blended at every step, so without seams.

    The times are explicit; between them the probability flow is followed to second order (`probability_flow`).

    Memory beyond the volume itself is one window of network activations plus at most `cached_windows` encoded
    conditions.

    Args:
        timesteps: descending times of the network calls, or a number of evenly spaced ones.
        sample_strength: how much of the drawn remainder is added to the predicted mean: 0 is the mean, without a call
            of the U-Net, 1 a full sample.
        roi_size: window; None renders the whole volume at once.
        overlap: fraction of a window shared with the next.
        seed: with the case name, the only source of randomness.
        hu_range: limits of the result.
        cached_windows: encoded conditions kept over the steps; further windows are encoded anew at each step.
        progress: show a progress bar.

    Raises:
        ValueError: when a window size is not a positive even number or `overlap` is outside [0, 1).
    """

    def __init__(
        self,
        timesteps: Sequence[int] | int = 10,
        *,
        sample_strength: float = 1.0,
        roi_size: Sequence[int] | None = None,
        overlap: float = 0.4,
        seed: int = 0,
        hu_range: Sequence[float] = HU_RANGE,
        cached_windows: int = 64,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if roi_size is not None and any(n < 2 or n % 2 for n in roi_size):
            raise ValueError(f"roi_size: windows must have positive even sizes, got {list(roi_size)}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap: must be in [0, 1), got {overlap}")
        if not 0 <= sample_strength <= 1:
            raise ValueError(
                f"sample_strength: must be between 0 (the mean) and 1 (a full sample), got {sample_strength}"
            )
        self.sample_strength = sample_strength
        self.timesteps, self.roi_size = listed_timesteps(timesteps), roi_size
        self.overlap, self.seed, self.hu_range = overlap, seed, hu_range
        self.cached_windows, self.progress = cached_windows, progress

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: StructDiffUNet, cases: Sequence[str]
    ) -> torch.Tensor:
        """Render a batch.

        Args:
            inputs: context (B, 4, H, W, D).
            network: in evaluation mode.
            cases: name of every sample, which fixes its noise.

        Returns:
            (B, 1, H, W, D) HU.

        Raises:
            ValueError: when there is not one name per sample.
        """
        return self.render(inputs, network, cases, self.timesteps)

    def render(
        self, inputs: torch.Tensor, network: StructDiffUNet, cases: Sequence[str], times: Sequence[int]
    ) -> torch.Tensor:
        """As `__call__`, along the given times.

        Raises:
            ValueError: naming the cases whose rendering is not finite: limits would turn that into plausible HU.
        """
        context = self._context(inputs, network)
        return self._render(context, self._encode(context, network), network, cases, times)

    def _context(self, inputs: torch.Tensor, network: StructDiffUNet) -> torch.Tensor:
        """What is rendered: the inputs; where they tell a mask alone, the mean of these, which becomes a template."""
        context = torch.as_tensor(inputs).as_subclass(torch.Tensor)
        given = Context.of(context)
        alone = given.modes() == MODES.index("mask_only")
        if not bool(alone.any()):
            return context
        encoded = self._encode(context, network)
        drawn = self._to_hu(encoded.whole(encoded.mean), context)
        prior = own_template(drawn, given.target_label, given.prior_hu)
        own = Context(given.target_label, prior, given.target_label, prior).stacked()
        return torch.where(alone.view(-1, 1, 1, 1, 1), own, context)

    def _render(
        self,
        context: torch.Tensor,
        encoded: Encoded,
        network: StructDiffUNet,
        cases: Sequence[str],
        times: Sequence[int],
    ) -> torch.Tensor:
        """As `render`, of what is encoded already, which takes most of the time of a mean."""
        if len(cases) != len(context):
            raise ValueError(f"cases: one name for each of the {len(context)} samples is needed, got {len(cases)}")
        size = tuple(context.shape[2:])
        noise = torch.stack([case_noise((1, *size), self.seed, case) for case in cases]).to(context)
        residual = encoded.mean
        if self.sample_strength > 0:
            packed = crop(haar_pack(pad_to_multiple(noise, 2)), encoded.box)
            drawn = self._remainder(packed, encoded, network, times)
            residual = residual + self.sample_strength * encoded.sigma * drawn
        rendered = self._to_hu(encoded.whole(residual), context)
        if bad := [case for case, volume in zip(cases, rendered, strict=True) if not bool(volume.isfinite().all())]:
            raise ValueError(
                f"{', '.join(bad)}: the rendering is NaN or infinite, so the weights are not sound; use another "
                "`ckpt_dir`, or train anew with a lower `learning_rate`"
            )
        return rendered.clamp(*self.hu_range)

    def _to_hu(self, residual: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Structure of a packed residual; where there is a template, labels have the means that it says."""
        known = Context.of(context)
        image = crop_to(haar_unpack(residual), known.prior_hu.shape[2:]) * RESIDUAL_UNIT_HU + known.prior_hu
        guided = known.modes().view(-1, 1, 1, 1, 1) == MODES.index("template")
        return torch.where(guided, with_label_means(image, known.target_label, known.prior_hu), image)

    def _encode(self, context: torch.Tensor, network: StructDiffUNet) -> Encoded:
        """Conditions of all windows and the moments of what is drawn of the volume, padded to even sizes."""
        context = pad_to_multiple(context, 2)
        near = near_labels(Context.of(context))
        box, grid = drawn_box(near), near.shape[2:]
        context, near = crop(context, _scaled(box, 2)), crop(near, box)
        size = context.shape[2:]
        windows = windows_of(size, self.roi_size or size, self.overlap)
        packed = [_scaled(window, 0.5) for window in windows]
        cache: dict[int, Condition] = {}

        def condition(index: int) -> Condition:
            if index in cache:
                return cache[index]
            encoded = network.encode(crop(context, windows[index]), near=crop(near, packed[index]))
            if len(cache) < self.cached_windows:
                cache[index] = encoded
            return encoded

        def moments(index: int) -> torch.Tensor:
            encoded = condition(index)
            both = torch.cat([encoded.mean, encoded.sigma.log()], 1)
            return crop_to(both, [axis.stop - axis.start for axis in packed[index]])

        mean, log_sigma = blended(moments, packed, near.shape[2:]).chunk(2, 1)
        return Encoded(box, packed, condition, mean, log_sigma.exp(), grid)

    def _remainder(
        self, noise: torch.Tensor, encoded: Encoded, network: StructDiffUNet, times: Sequence[int]
    ) -> torch.Tensor:
        """Standardised remainder (B, 8, h, w, d) of packed noise: the probability flow in the angle, noise to image."""

        def window_flow(y: torch.Tensor, timesteps: torch.Tensor, index: int) -> torch.Tensor:
            return network.flow(crop(y, encoded.windows[index]), timesteps, encoded.condition(index).features)

        def flow(y: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return blended(partial(window_flow, y, timesteps), encoded.windows, y.shape[2:])

        return probability_flow(noise, flow, network.alphas_cumprod, times, progress=self.progress)
