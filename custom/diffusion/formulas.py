"""The formulas of the diffusion, one function each, on plain tensors.

Symbols: a, s = signal and noise amplitude at time t (a^2 + s^2 = 1); z = standardised remainder; y = a z + s eps;
v = a eps - s z (Salimans & Ho 2022, eq. in appendix D); psi = atan2(s, a): pi/2 is pure noise, 0 is clean.
"""

from __future__ import annotations

import torch


def amplitudes(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise amplitudes (a, s) of every sample, float32, shaped (B, 1, ..., 1) with `ndim` axes."""
    # MONAI's `DiffusionInferer.sample` passes whole numbers as float32.
    alpha = alphas_cumprod[timesteps.long()].float().reshape(-1, *[1] * (ndim - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()


def angle_step(
    y: torch.Tensor, f: torch.Tensor, step: torch.Tensor, previous: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """One second-order Adams-Bashforth step of dy/dpsi = F (ours); the first step of a trajectory is Euler's.

    Where the residual is Gaussian grain, F = 0 and y does not change: the grain keeps its exact spread at any number of
    steps. DDIM multiplies y by the cosine of every step instead and loses a fifth of the grain at 10 steps.

    Args:
        y: preconditioned sample at psi.
        f: F(y) there.
        step: change of psi, negative towards the image; broadcastable to y.
        previous: F and step of the step before, or None.

    Returns:
        the sample at psi + step.
    """
    if previous is not None:
        f_before, step_before = previous
        f = f + step / step_before / 2 * (f - f_before)
    return y + step * f
