"""The formulas of the diffusion, one function each, on plain tensors.

Symbols: a, s = signal and noise amplitude at time t (a^2 + s^2 = 1); z = standardised remainder; y = a z + s eps;
v = a eps - s z (Salimans & Ho 2022, eq. in appendix D); psi = atan2(s, a): pi/2 is pure noise, 0 is clean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm


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


def probability_flow(
    y: torch.Tensor,
    flow: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    alphas_cumprod: torch.Tensor,
    times: Sequence[int],
    *,
    sd: torch.Tensor | float = 1.0,
    progress: bool = False,
) -> torch.Tensor:
    """Follow the deterministic probability flow in the angle from noise to a clean sample.

    Args:
        y: (B, ...) standard normal noise.
        flow: F(y, times (B,) int64) -> velocity, shaped as y.
        alphas_cumprod: (T,) of the training schedule.
        times: descending, of the calls; after the last one the sample is clean.
        sd: of what the schedule's noise was added to, broadcastable to y, which is of unit variance at every time all
            the same: its angle is then atan2(s, sd a).
        progress: show a progress bar.

    Returns:
        the clean sample, of unit variance.
    """
    alphas = torch.cat([alphas_cumprod, alphas_cumprod.new_ones(1)]).clamp(0, 1)  # index -1 is the clean sample
    previous = None
    steps = list(zip(times, [*times[1:], -1], strict=True))
    for t, following in tqdm(steps, desc="rendering", disable=not progress, leave=False):
        now, then = (torch.atan2((1 - alphas[at]).sqrt(), sd * alphas[at].sqrt()) for at in (t, following))
        f = flow(y, torch.full((len(y),), t, dtype=torch.long, device=y.device))
        y, previous = angle_step(y, f, then - now, previous), (f, then - now)
    return y
