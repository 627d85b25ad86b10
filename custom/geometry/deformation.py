"""Smooth invertible deformations of 3D grids: reading, composing, exponentiating and drawing them (torch).

Conventions, for every function here:

- A *displacement* or *velocity* is (B, 3, H, W, D) in voxels of its own grid; component k moves along spatial axis k,
  in the order H, W, D (as `monai.networks.blocks.Warp`).
- *Coordinates* are (B, 3, H, W, D): for each voxel of an output grid, the position to read, in voxels of the volume
  that is read, whose shape may differ. `sample` reads them; outside means the nearest border voxel.
- Pull-back: `warp(volume, u)(x) = volume(x + u(x))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "compose",
    "exponentiate",
    "identity_coordinates",
    "jacobian_determinant",
    "random_velocity",
    "sample",
    "sample_labels",
    "warp",
]

_STEP_PER_SIGMA = 0.75  # distance of basis nodes. Ours: the variance between nodes then ripples by less than 0.1 %
_MARGIN_PER_SIGMA = 2.5  # nodes beyond the grid. Ours: those farther out hold 3e-7 of the variance at its border


def check_volume(name: str, volume: Tensor, channels: int | None = None) -> None:
    """Refuses what is not (B, C, H, W, D), naming the argument; `channels` None allows any C."""
    if volume.ndim != 5 or (channels is not None and volume.shape[1] != channels):
        wanted = f"(B, {'C' if channels is None else channels}, H, W, D)"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(volume.shape)}; add or move its axes.")


def check_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Three positive lengths, as floats."""
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm must be three positive lengths in mm, one per axis, got {tuple(spacing_mm)}.")
    h, w, d = (float(s) for s in spacing_mm)
    return h, w, d


def identity_coordinates(shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Coordinates that read every voxel of a grid at its own place.

    Args:
        shape: (H, W, D).
        device: where to make them.

    Returns:
        (1, 3, H, W, D) float32, in voxels.
    """
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def sample(volume: Tensor, coordinates: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Reads a volume at given positions, with one interpolation.

    Args:
        volume: (B, C, h, w, d), any dtype. Integers are rounded after linear interpolation.
        coordinates: (B, 3, H, W, D) or (1, 3, H, W, D), in voxels of `volume`; outside reads the nearest border voxel.
        mode: "bilinear" (linear along the three axes) or "nearest".

    Returns:
        (B, C, H, W, D) of the dtype of `volume`.

    Raises:
        ValueError: if a shape or `mode` is wrong.
    """
    check_volume("volume", volume)
    check_volume("coordinates", coordinates, 3)
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got {mode!r}.")
    if coordinates.shape[0] not in (1, volume.shape[0]):
        raise ValueError(
            f"coordinates must have batch size 1 or {volume.shape[0]} as volume, got {coordinates.shape[0]}."
        )
    exact = volume.dtype if volume.dtype == torch.float64 else torch.float32
    last = torch.tensor([max(n - 1, 1) for n in volume.shape[:1:-1]], dtype=exact, device=volume.device)
    unit = (
        coordinates.to(exact).flip(1) * (2 / last.view(1, 3, 1, 1, 1)) - 1
    )  # grid_sample wants the last axis first, and -1 .. 1
    grid = unit.movedim(1, -1).expand(volume.shape[0], -1, -1, -1, -1)
    values = F.grid_sample(volume.to(exact), grid, mode=mode, padding_mode="border", align_corners=True)
    return (values if volume.dtype.is_floating_point else values.round()).to(volume.dtype)


def sample_labels(label_map: Tensor, coordinates: Tensor) -> Tensor:
    """Reads a label map at given positions without the staircases of nearest-neighbour reading. Ours.

    The label with most linear weight wins, ties go to the lower id; a label that is nearest to no position is left
    out. One label at a time is held as floating point, so memory does not grow with their number.

    Args:
        label_map: (B, 1, h, w, d) whole numbers, any dtype.
        coordinates: (B, 3, H, W, D) or (1, 3, H, W, D), as in `sample`; of a displacement,
            `identity_coordinates(shape) + displacement`.

    Returns:
        (B, 1, H, W, D) of the dtype of `label_map`; an empty map stays empty.

    Raises:
        ValueError: if a shape is wrong.
    """
    check_volume("label_map", label_map, 1)
    nearest = sample(label_map, coordinates, mode="nearest")
    winner, best = torch.zeros_like(nearest), torch.zeros_like(nearest, dtype=torch.float32)
    for label in nearest.unique().tolist():
        weight = sample((label_map == label).float(), coordinates)
        winner = winner.masked_fill(weight > best, label)
        best = torch.maximum(best, weight)
    return winner


def warp(volume: Tensor, displacement: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Pulls a volume through a displacement: warp(volume, u)(x) = volume(x + u(x)).

    Args:
        volume: (B, C, H, W, D), any dtype; kept.
        displacement: (B or 1, 3, H, W, D), in voxels.
        mode: "bilinear" or "nearest".

    Returns:
        (B, C, H, W, D).

    Raises:
        ValueError: if a shape or `mode` is wrong; different grids need `sample`.
    """
    check_volume("volume", volume)
    check_volume("displacement", displacement, 3)
    if volume.shape[2:] != displacement.shape[2:]:
        raise ValueError(
            f"displacement must be on the grid {tuple(volume.shape[2:])} of volume, got "
            f"{tuple(displacement.shape[2:])}; for different grids pass coordinates to sample()."
        )
    return sample(volume, identity_coordinates(volume.shape[2:], device=volume.device) + displacement, mode=mode)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Displacement that does `first`, then `second`: warp(warp(volume, first), second) = warp(volume, compose(...)).

    (first then second)(x) = second(x) + first(x + second(x)); the equality holds up to interpolation.

    Args:
        first: (B, 3, H, W, D), in voxels, applied to the volume first.
        second: (B or 1, 3, H, W, D), in voxels, applied to the result.

    Returns:
        (B, 3, H, W, D), in voxels.

    Raises:
        ValueError: if a shape is wrong.
    """
    return second + warp(first, second)


def exponentiate(velocity: Tensor, steps: int = 6) -> Tensor:
    """Flows along a stationary velocity field for unit time, by scaling and squaring (Arsigny et al. 2006).

    As `monai.networks.blocks.DVF2DDF` with border padding, which warns whenever one is built. The inverse map is
    `exponentiate(-velocity)`.

    Args:
        velocity: (B, 3, H, W, D), in voxels.
        steps: number of squarings, at least 1; the first step is velocity / 2**steps.

    Returns:
        Displacement (B, 3, H, W, D), in voxels.

    Raises:
        ValueError: if a shape is wrong or `steps` is below 1.
    """
    check_volume("velocity", velocity, 3)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Local volume change det(I + du/dx) of x + u(x), by central differences (one-sided at the border).

    Args:
        displacement: (B, 3, H, W, D), in voxels, at least two voxels along each axis.

    Returns:
        (B, 1, H, W, D): 1 for the identity, above 1 where the map reads from a larger region than it fills, 0 or below
        where it folds. The value does not depend on the spacing.

    Raises:
        ValueError: if the shape is wrong.
    """
    check_volume("displacement", displacement, 3)
    if min(displacement.shape[2:]) < 2:
        raise ValueError(f"displacement must have two voxels along each axis, got {tuple(displacement.shape[2:])}.")
    batch, _, *shape = displacement.shape
    jacobian = displacement.new_empty(batch, *shape, 3, 3)
    for axis, derivative in enumerate(torch.gradient(displacement, dim=(2, 3, 4))):
        jacobian[..., axis] = derivative.movedim(1, -1)  # in place, a quarter faster than stacked
    jacobian.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.linalg.det(jacobian)[:, None]


def _gaussian_basis(positions_mm: Tensor, extent_mm: float, sigma_mm: float) -> Tensor:
    """Values (positions, nodes) of a Gaussian basis along an axis of 0 .. extent_mm, each row of unit length.

    With white weights, the sum is a unit-variance Gaussian process of covariance exp(-r^2 / (2 sigma_mm^2)): a kernel
    exp(-r^2 / sigma_mm^2) convolved with itself gives just that. Separable, so three axes need three products.
    """
    step, margin = _STEP_PER_SIGMA * sigma_mm, _MARGIN_PER_SIGMA * sigma_mm
    count = int((extent_mm + 2 * margin) / step) + 2
    nodes = extent_mm / 2 + step * (torch.arange(count, device=positions_mm.device) - (count - 1) / 2)
    kernel = torch.exp(-(((positions_mm[:, None] - nodes) / sigma_mm) ** 2))
    return kernel / kernel.norm(dim=1, keepdim=True)


def gaussian_bases(
    shape: Sequence[int], spacing: Sequence[float], sigma_mm: float, factors: Sequence[int], device: torch.device
) -> list[Tensor]:
    """One basis per axis of a grid, at the centres of blocks of `factors` voxels."""
    bases = []
    for size, step, factor in zip(shape, spacing, factors, strict=True):
        centres = torch.arange(-(-size // factor), device=device) * factor + (factor - 1) / 2
        bases.append(_gaussian_basis(centres * step, (size - 1) * step, sigma_mm))
    return bases


def expand(weights: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Field (..., H, W, D) of weights (..., nodes_H, nodes_W, nodes_D) over one basis per axis."""
    field = weights @ bases[2].T
    field = bases[1] @ field
    return (bases[0] @ field.flatten(-2)).unflatten(-1, field.shape[-2:])


def to_voxels(field_mm: Tensor, spacing: Sequence[float]) -> Tensor:
    """Field (B, 3, ...) in mm, divided by the spacing (mm) along each axis."""
    return field_mm / torch.tensor(spacing, device=field_mm.device).view(1, 3, 1, 1, 1)


def random_velocity(
    shape: Sequence[int],
    *,
    spacing_mm: Sequence[float],
    sigma_mm: float,
    amplitude_mm: float,
    generator: torch.Generator,
    batch: int = 1,
) -> Tensor:
    """Draws smooth stationary Gaussian random velocity fields. Ours.

    Each component has covariance exp(-r^2 / (2 sigma_mm^2)); each draw is then scaled to its amplitude, so that
    `amplitude_mm` means the same for one field as for many.

    Args:
        shape: (H, W, D).
        spacing_mm: voxel size along each axis, mm.
        sigma_mm: correlation length, mm; at least the largest voxel size.
        amplitude_mm: root mean square length of the vectors over the grid, mm; 0 gives zeros.
        generator: the only source of randomness; the fields lie on its device. Item 0 does not depend on `batch`.
        batch: number of fields.

    Returns:
        (batch, 3, H, W, D) float32, in voxels.

    Raises:
        ValueError: if a length, the shape or the spacing is out of range.
    """
    spacing = check_spacing(spacing_mm)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be three positive sizes (H, W, D), got {tuple(shape)}.")
    if sigma_mm < max(spacing):
        raise ValueError(f"sigma_mm must be at least the voxel size {max(spacing)} mm, got {sigma_mm}; raise it.")
    if amplitude_mm < 0:
        raise ValueError(f"amplitude_mm must not be negative, got {amplitude_mm}.")
    device = generator.device
    bases = gaussian_bases(shape, spacing, sigma_mm, (1, 1, 1), device)
    nodes = [basis.shape[1] for basis in bases]
    draws = [torch.randn(3, *nodes, generator=generator, device=device) for _ in range(batch)]
    field = expand(torch.stack(draws), bases)
    rms = field.square().sum(1, keepdim=True).mean((2, 3, 4), keepdim=True).sqrt()
    return to_voxels(field * (amplitude_mm / rms), spacing)
