"""Layer 0: the formulas of the diffusion, one function each, on plain tensors.

Symbols: a, s = signal and noise amplitude at time t (a^2 + s^2 = 1); x0 = clean residual; x = a x0 + s eps;
v = a eps - s x0 (Salimans & Ho 2022, eq. in appendix D); sigma = prior standard deviation of x0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def _haar_matrix() -> torch.Tensor:
    """(8, 8) orthonormal 3D Haar analysis matrix; row 0 is the low-pass band, columns run over (h, w, d) offsets."""
    low_high = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    return torch.kron(torch.kron(low_high, low_high), low_high)


_HAAR = _haar_matrix()


def space_to_depth(x: torch.Tensor) -> torch.Tensor:
    """Move every 2x2x2 block into channels: (B, C, H, W, D) -> (B, 8C, H/2, W/2, D/2), block offsets fastest.

    Raises:
        ValueError: when a spatial size is odd.
    """
    if any(n % 2 for n in x.shape[2:]):
        raise ValueError(f"x: spatial sizes must be even to be packed, got {tuple(x.shape[2:])}; pad the volume first")
    b, c, h, w, d = x.shape
    blocks = x.reshape(b, c, h // 2, 2, w // 2, 2, d // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return blocks.reshape(b, 8 * c, h // 2, w // 2, d // 2)


def depth_to_space(x: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`space_to_depth`: (B, 8C, h, w, d) -> (B, C, 2h, 2w, 2d)."""
    b, c8, h, w, d = x.shape
    blocks = x.reshape(b, c8 // 8, 2, 2, 2, h, w, d).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return blocks.reshape(b, c8 // 8, 2 * h, 2 * w, 2 * d)


def _mix_bands(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    b, c8 = x.shape[:2]
    mixed = torch.einsum("ij,bcjn->bcin", matrix.to(x), x.reshape(b, c8 // 8, 8, -1))
    return mixed.reshape(x.shape)


def haar_pack(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal 3D Haar transform, one level: (B, C, H, W, D) -> (B, 8C, H/2, W/2, D/2).

    Lossless, keeps energy, and keeps white noise white, so a diffusion of the packed volume is the voxel diffusion.
    Band 0 of every channel is the low-pass band (2 sqrt(2) times the block mean).

    Raises:
        ValueError: when a spatial size is odd.
    """
    return _mix_bands(space_to_depth(x), _HAAR)


def haar_unpack(x: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`haar_pack`: (B, 8C, h, w, d) -> (B, C, 2h, 2w, 2d)."""
    return depth_to_space(_mix_bands(x, _HAAR.T))


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


def ddim_step(
    x: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One deterministic DDIM step (Song et al. 2021, eq. 12 with eta = 0) written for v-prediction.

    Args:
        x, v: current sample and predicted velocity, same shape.
        alpha, alpha_next: cumulative alpha (a^2) at the current and at the next, less noisy, time; 1 means clean.

    Returns:
        the sample at the next time and the predicted clean sample.
    """
    a, s = alpha.sqrt(), (1 - alpha).sqrt()
    x0 = a * x - s * v
    eps = s * x + a * v
    return alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * eps, x0


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


def at(x: torch.Tensor, window: Sequence[slice]) -> torch.Tensor:
    """View of (..., H, W, D) in a window of three slices."""
    return x[..., window[0], window[1], window[2]]


def corner(size: Sequence[int]) -> tuple[slice, ...]:
    """Window of the given size at the first voxel; takes padding at the far end away."""
    return tuple(slice(n) for n in size)


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad the far end of each spatial axis of (B, C, H, W, D) by its edge value up to a multiple of `multiple`."""
    missing = [-n % multiple for n in x.shape[2:]]
    if not any(missing):
        return x
    return F.pad(x, [p for m in reversed(missing) for p in (0, m)], mode="replicate")
