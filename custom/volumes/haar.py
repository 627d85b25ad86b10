"""One level of the orthonormal 3D Haar transform, as channels."""

from __future__ import annotations

import torch


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
