"""The formulas of the diffusion, one function each, on plain tensors.

Symbols: a, s = signal and noise amplitude at time t (a^2 + s^2 = 1); x0 = clean residual; x = a x0 + s eps;
v = a eps - s x0 (Salimans & Ho 2022, eq. in appendix D); sigma = prior standard deviation of x0.
"""

from __future__ import annotations

import torch


def amplitudes(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise amplitudes (a, s) of every sample, float32, shaped (B, 1, ..., 1) with `ndim` axes."""
    # MONAI's `DiffusionInferer.sample` passes whole numbers as float32.
    alpha = alphas_cumprod[timesteps.long()].float().reshape(-1, *[1] * (ndim - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()


def precondition(
    a: torch.Tensor, s: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Analytic preconditioning of v-prediction (ours): v = c_skip x + c_out F(c_in x).

    For x0 ~ N(0, sigma^2) the term c_skip x is the exact posterior mean of v and c_out the exact posterior standard
    deviation, so F always has a unit-variance target, whatever the local scale of the residual:

        c_in   = 1 / sqrt(a^2 sigma^2 + s^2)
        c_skip = a s (1 - sigma^2) / (a^2 sigma^2 + s^2)
        c_out  = sigma / sqrt(a^2 sigma^2 + s^2)

    Args:
        a, s: amplitudes, broadcastable to `sigma`, a^2 + s^2 = 1.
        sigma: standard deviation of the scaled residual, > 0.

    Returns:
        c_in, c_skip, c_out, each shaped as the broadcast of the arguments.
    """
    variance = a**2 * sigma**2 + s**2
    return variance.rsqrt(), a * s * (1 - sigma**2) / variance, sigma * variance.rsqrt()


def angle(a: torch.Tensor, s: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Angle psi = atan2(s, a sigma) of the preconditioned sample y = c_in x (ours).

    With z = x0 / sigma, y = cos(psi) z + sin(psi) eps: pi/2 is pure noise, 0 is clean. The probability flow is
    dy/dpsi = F(y), with F the output of the preconditioned network.
    """
    s = s.expand(torch.broadcast_shapes(s.shape, sigma.shape))
    return torch.atan2(s, a * sigma)


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
