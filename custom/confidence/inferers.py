"""Inferers that render a structure and the variance of its voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from custom.confidence.variance import RunningVariance, predicted_variance
from custom.diffusion.context import RESIDUAL_UNIT_HU
from custom.diffusion.network import SIGMA_RANGE, StructDiffUNet
from custom.diffusion.sampler import Encoded, StructDiffInferer
from custom.diffusion.schedule import spaced_timesteps
from custom.volumes.grids import crop_to

_TOLERATED_DEVIATIONS = 3.0  # ours: farther from the mean than that, an image does not show its label


class PredictedVarianceInferer(StructDiffInferer):
    """Render a structure and the variance that the network predicts for it anyway (ours).

    Where an image is farther from the predicted mean than three deviations, as where it does not show its label, a
    ninth of the squared distance counts instead. No network call more than the image alone.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: StructDiffUNet, cases: Sequence[str]
    ) -> torch.Tensor:
        """Render a batch.

        Returns:
            (B, 2, H, W, D): structure of :class:`StructDiffInferer` in HU, and variance in HU^2.
        """
        context = self._context(inputs, network)
        encoded = self._encode(context, network)
        image = self._render(context, encoded, network, cases, self.timesteps)
        return torch.cat([image, self._variance(image, context, encoded)], 1)

    @torch.no_grad()
    def variance(self, image: torch.Tensor, inputs: torch.Tensor, network: StructDiffUNet) -> torch.Tensor:
        """Variance (B, 1, H, W, D) in HU^2 of any structure (B, 1, H, W, D) in HU, given a context (B, 4, H, W, D)."""
        context = self._context(inputs, network)
        return self._variance(image, context, self._encode(context, network))

    def _variance(self, image: torch.Tensor, context: torch.Tensor, encoded: Encoded) -> torch.Tensor:
        expected = self._to_hu(encoded.whole(encoded.mean), context)
        sigma = encoded.whole(encoded.sigma, SIGMA_RANGE[0])
        predicted = crop_to(predicted_variance(sigma), context.shape[2:]) * RESIDUAL_UNIT_HU**2
        return torch.maximum(predicted, ((image - expected) / _TOLERATED_DEVIATIONS).square())


class SkipSamplingInferer(StructDiffInferer):
    """Render a structure and its skip-sampling variance: the same noise along schedules that skip differently.

    All schedules begin and end alike and differ in stride. They run one after the other, so memory is that of one
    rendering and two more volumes. The image is that of the longest schedule; the variance is that of full samples,
    whatever `sample_strength` the image has.

    Args:
        strides: numbers of network calls, two or more different ones; 4, 6, 8, 12 make 30 calls.
        options: of :class:`StructDiffInferer`, but for its times.

    Raises:
        ValueError: with fewer than two different schedules, and as :class:`StructDiffInferer`.
    """

    def __init__(self, *, strides: Sequence[int] = (4, 6, 8, 12), **options: Any) -> None:
        if len(set(strides)) < max(2, len(strides)):
            raise ValueError(f"strides: two or more different numbers of network calls are needed, got {list(strides)}")
        ordered = sorted(strides)
        super().__init__(ordered[-1], **options)
        self.schedules = [spaced_timesteps(calls) for calls in ordered]

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: StructDiffUNet, cases: Sequence[str]
    ) -> torch.Tensor:
        """Render a batch.

        Returns:
            (B, 2, H, W, D): structure in HU and skip-sampling variance in HU^2.
        """
        context = self._context(inputs, network)
        encoded = self._encode(context, network)
        strength, self.sample_strength = self.sample_strength, 1.0
        try:
            variance = RunningVariance()
            for times in self.schedules:
                image = self._render(context, encoded, network, cases, times)
                variance.add(image)
        finally:
            self.sample_strength = strength
        if strength < 1:
            image = self._render(context, encoded, network, cases, self.schedules[-1])
        return torch.cat([image, variance.value()], 1)
