"""Smooth invertible deformations of 3D grids and training-free registration of label maps (layer 0, torch).

Conventions, for every function here:

- A *displacement* or *velocity* is (B, 3, H, W, D) in voxels of its own grid; component k moves along spatial axis k, in
  the order H, W, D (as `monai.networks.blocks.Warp`).
- *Coordinates* are (B, 3, H, W, D): for each voxel of an output grid, the position to read, in voxels of the volume that
  is read, whose shape may differ. `sample` reads them; reading outside gives the nearest border voxel.
- Pull-back: `warp(volume, u)(x) = volume(x + u(x))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "align_extent",
    "compose",
    "exponentiate",
    "identity_coordinates",
    "jacobian_determinant",
    "label_velocity",
    "random_velocity",
    "register_label_maps",
    "sample",
    "template_coordinates",
    "warp",
    "warp_labels",
]

_STEP_PER_SIGMA = 0.75  # distance of basis nodes: the variance between nodes then ripples by less than 0.1 %
_MARGIN_PER_SIGMA = 2.5  # nodes beyond the grid, so that the field is stationary up to its border

_WEIGHT_MM = 10.0  # displacement that a unit weight of the registration stands for
_SMOOTHNESS = 1e-4  # weight of the squared weights against the overlap
_FIT_SIGMA_MM = 12.0  # correlation length of the registration's velocity
_BLOCKS_MM = (8.0, 4.5)  # label grids of the registration, coarse to fine
_FIT_SQUARINGS = 4


def _check_volume(name: str, volume: Tensor, channels: int | None = None) -> None:
    if volume.ndim != 5 or (channels is not None and volume.shape[1] != channels):
        wanted = f"(B, {'C' if channels is None else channels}, H, W, D)"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(volume.shape)}; add or move its axes.")


def _check_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
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
    _check_volume("volume", volume)
    _check_volume("coordinates", coordinates, 3)
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got {mode!r}.")
    if coordinates.shape[0] not in (1, volume.shape[0]):
        raise ValueError(
            f"coordinates must have batch size 1 or {volume.shape[0]} as volume, got {coordinates.shape[0]}; repeat them."
        )
    exact = volume.dtype if volume.dtype == torch.float64 else torch.float32
    last = torch.tensor([max(n - 1, 1) for n in volume.shape[2:]], dtype=exact, device=volume.device)
    unit = coordinates.to(exact).movedim(1, -1) * (2 / last) - 1
    values = F.grid_sample(
        volume.to(exact),
        unit.flip(-1).expand(volume.shape[0], -1, -1, -1, -1),  # grid_sample wants the last axis first
        mode=mode,
        padding_mode="border",
        align_corners=True,
    )
    return (values if volume.dtype.is_floating_point else values.round()).to(volume.dtype)


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
    _check_volume("volume", volume)
    _check_volume("displacement", displacement, 3)
    if volume.shape[2:] != displacement.shape[2:]:
        raise ValueError(
            f"displacement must be on the grid {tuple(volume.shape[2:])} of volume, got {tuple(displacement.shape[2:])}; "
            "for different grids pass coordinates to sample()."
        )
    return sample(volume, identity_coordinates(volume.shape[2:], device=volume.device) + displacement, mode=mode)


def warp_labels(label_map: Tensor, displacement: Tensor, num_labels: int) -> Tensor:
    """Warps a label map without the staircases of nearest-neighbour reading: the label with most linear weight wins.

    One label at a time is held as floating point, so memory does not grow with `num_labels`. Ties go to the lower id.

    Args:
        label_map: (B, 1, H, W, D) integer labels 0 .. num_labels - 1.
        displacement: (B or 1, 3, H, W, D), in voxels.
        num_labels: number of labels with background.

    Returns:
        (B, 1, H, W, D) of the dtype of `label_map`; an empty map stays empty.

    Raises:
        ValueError: if a shape is wrong or a label lies outside 0 .. num_labels - 1.
    """
    _check_volume("label_map", label_map, 1)
    low, high = int(label_map.min()), int(label_map.max())
    if low < 0 or high >= num_labels:
        raise ValueError(f"label_map must hold labels 0 .. {num_labels - 1}, got {low} .. {high}; raise num_labels.")
    winner = torch.zeros_like(label_map)
    best = warp((label_map == 0).float(), displacement)
    for label in range(1, num_labels):
        weight = warp((label_map == label).float(), displacement)
        ahead = weight > best
        winner[ahead] = label
        best = torch.maximum(best, weight)
    return winner


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
    _check_volume("velocity", velocity, 3)
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
    _check_volume("displacement", displacement, 3)
    if min(displacement.shape[2:]) < 2:
        raise ValueError(f"displacement must have two voxels along each axis, got {tuple(displacement.shape[2:])}.")
    rows = [torch.gradient(displacement[:, k], dim=(1, 2, 3)) for k in range(3)]
    J = [[rows[i][j] + float(i == j) for j in range(3)] for i in range(3)]
    det = (
        J[0][0] * (J[1][1] * J[2][2] - J[1][2] * J[2][1])
        - J[0][1] * (J[1][0] * J[2][2] - J[1][2] * J[2][0])
        + J[0][2] * (J[1][0] * J[2][1] - J[1][1] * J[2][0])
    )
    return det[:, None]


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


def _bases(
    shape: Sequence[int], spacing: Sequence[float], sigma_mm: float, factors: Sequence[int], device: torch.device
) -> list[Tensor]:
    """One basis per axis of a grid, at the centres of blocks of `factors` voxels."""
    bases = []
    for size, step, factor in zip(shape, spacing, factors, strict=True):
        centres = torch.arange(-(-size // factor), device=device) * factor + (factor - 1) / 2
        bases.append(_gaussian_basis(centres * step, (size - 1) * step, sigma_mm))
    return bases


def _expand(weights: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Field (..., H, W, D) of weights (..., nodes_H, nodes_W, nodes_D) over one basis per axis."""
    field = weights @ bases[2].T
    field = bases[1] @ field
    return (bases[0] @ field.flatten(-2)).unflatten(-1, field.shape[-2:])


def _to_voxels(field_mm: Tensor, spacing: Sequence[float]) -> Tensor:
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
    spacing = _check_spacing(spacing_mm)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be three positive sizes (H, W, D), got {tuple(shape)}.")
    if sigma_mm < max(spacing):
        raise ValueError(f"sigma_mm must be at least the voxel size {max(spacing)} mm, got {sigma_mm}; raise it.")
    if amplitude_mm < 0:
        raise ValueError(f"amplitude_mm must not be negative, got {amplitude_mm}.")
    device = generator.device
    bases = _bases(shape, spacing, sigma_mm, (1, 1, 1), device)
    nodes = [basis.shape[1] for basis in bases]
    draws = [torch.randn(3, *nodes, generator=generator, device=device) for _ in range(batch)]
    field = _expand(torch.stack(draws), bases)
    rms = field.square().sum(1, keepdim=True).mean((2, 3, 4), keepdim=True).sqrt()
    return _to_voxels(field * (amplitude_mm / rms), spacing)


def _plain(label_map: Tensor) -> Tensor:
    """Drops tensor subclasses (MONAI's MetaTensor): their bookkeeping would cost more than the registration."""
    return label_map.detach().as_subclass(Tensor)


def _common_labels(moving: Tensor, fixed: Tensor, labels: Sequence[int]) -> list[int]:
    """Labels that every item of both maps holds, after checking both maps."""
    for name, label_map in (("moving", moving), ("fixed", fixed)):
        _check_volume(name, label_map, 1)
    if moving.shape[0] != fixed.shape[0]:
        raise ValueError(f"moving and fixed must have one batch size, got {moving.shape[0]} and {fixed.shape[0]}.")
    maps = (*moving, *fixed)
    common = [label for label in labels if all(bool((item == label).any()) for item in maps)]
    if not common:
        found = [sorted(int(v) for v in m.unique() if v != 0) for m in (moving, fixed)]
        raise ValueError(
            f"labels must name at least one label present in both maps, got {list(labels)} while moving holds {found[0]} "
            f"and fixed {found[1]}; choose other labels or another template."
        )
    return common


def _centre_and_extent(label_map: Tensor, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, 3) in voxels, per axis, of the positions of labels of equal weight."""
    density = torch.zeros_like(label_map[:, 0], dtype=torch.float32)
    for label in labels:
        inside = label_map[:, 0] == label
        density += inside / inside.sum((1, 2, 3), keepdim=True)
    moments = []
    for axis in range(1, 4):
        profile = density.sum([a for a in range(1, 4) if a != axis]).double() / len(labels)
        position = torch.arange(profile.shape[1], device=profile.device)
        mean = (profile * position).sum(1, keepdim=True)
        moments.append((mean, (profile * (position - mean) ** 2).sum(1, keepdim=True).sqrt()))
    means, extents = zip(*moments, strict=True)
    return torch.cat(means, 1), torch.cat(extents, 1)


def align_extent(
    moving: Tensor, fixed: Tensor, *, labels: Sequence[int], scale_range: tuple[float, float] = (0.7, 1.4)
) -> Tensor:
    """Aligns the position and size of some structures: matches centroid and standard deviation per axis. Ours.

    The maps may differ in shape but must share spacing and orientation (the caller resamples), so voxels serve as
    lengths. Labels missing in either map are left out of both.

    Args:
        moving: (B, 1, h, w, d) integer labels.
        fixed: (B, 1, H, W, D) integer labels.
        labels: ids whose union is aligned.
        scale_range: limits of the scale from fixed to moving along each axis. Structures without extent keep scale 1.

    Returns:
        Affine (B, 3, 4) that takes a position in `fixed`, in voxels, to the position to read in `moving`.

    Raises:
        ValueError: if a shape is wrong or no label is in both maps.
    """
    moving, fixed = _plain(moving), _plain(fixed)
    common = _common_labels(moving, fixed, labels)
    (centre_m, extent_m), (centre_f, extent_f) = (_centre_and_extent(m, common) for m in (moving, fixed))
    flat = (extent_m == 0) | (extent_f == 0)
    scale = torch.where(flat, 1.0, extent_m / extent_f).clamp(*scale_range)
    return torch.cat([torch.diag_embed(scale), (centre_m - scale * centre_f)[..., None]], 2).float()


def _transform(affine: Tensor, coordinates: Tensor) -> Tensor:
    """Applies (B, 3, 4) to coordinates (B or 1, 3, H, W, D)."""
    moved = affine[:, :, :3] @ coordinates.flatten(2) + affine[:, :, 3:]
    return moved.unflatten(2, coordinates.shape[2:])


def _soft_labels(label_map: Tensor, labels: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Blurred occupancy (B, L, H', W', D') of each label in blocks of `factors` voxels, by edge-padded averages."""
    short = [-n % f for n, f in zip(label_map.shape[2:], factors, strict=True)]
    padded = F.pad(label_map.float(), (0, short[2], 0, short[1], 0, short[0]), mode="replicate")
    stack = [F.avg_pool3d((padded == label).float(), tuple(factors)) for label in labels]
    occupancy = torch.cat(stack, 1)
    for _ in range(2):  # two 3^3 averages: close to a Gaussian of 1.15 blocks
        occupancy = F.avg_pool3d(F.pad(occupancy, (1,) * 6, mode="replicate"), 3, stride=1)
    return occupancy


def _overlap_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - soft Dice, 1 - 2 sum(ab) / sum(a^2 + b^2), mean over labels, sum over the batch."""
    axes = (2, 3, 4)
    return (1 - 2 * (a * b).sum(axes) / (a.square() + b.square()).sum(axes)).mean(1).sum()


def _descend(
    weights: Tensor, moving: Tensor, fixed: Tensor, bases: list[Tensor], block: list[float], steps: int
) -> None:
    """Improves the weights in place on one grid of blocks (sizes in mm), by L-BFGS.

    Not Adam: its equal steps for all weights raise the finest modes most and fold the grid (measured), while L-BFGS
    from zero stays in the span of the smooth gradients.
    """
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        displacement = exponentiate(_to_voxels(_WEIGHT_MM * _expand(weights, bases), block), _FIT_SQUARINGS)
        loss = _overlap_loss(warp(moving, displacement), fixed) + _SMOOTHNESS * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)


def _fit(
    moving: Tensor, fixed: Tensor, labels: Sequence[int], spacing: tuple[float, float, float], iterations: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Weights of the velocity that registers two maps, and the block factors of the finest grid used."""
    if moving.shape != fixed.shape:
        raise ValueError(
            f"moving must be on the grid {tuple(fixed.shape)} of fixed, got {tuple(moving.shape)}; "
            "use template_coordinates(), which takes different grids."
        )
    moving, fixed = _plain(moving), _plain(fixed)
    common = _common_labels(moving, fixed, labels)
    shape, device = fixed.shape[2:], fixed.device
    nodes = [basis.shape[1] for basis in _bases(shape, spacing, _FIT_SIGMA_MM, (1, 1, 1), device)]
    weights = torch.zeros(fixed.shape[0], 3, *nodes, device=device, requires_grad=True)
    for block_mm, steps in zip(_BLOCKS_MM, iterations, strict=True):
        factors = [max(1, round(block_mm / s)) for s in spacing]
        soft_moving, soft_fixed = (_soft_labels(m, common, factors) for m in (moving, fixed))
        bases = _bases(shape, spacing, _FIT_SIGMA_MM, factors, device)
        block = [f * s for f, s in zip(factors, spacing, strict=True)]
        with torch.enable_grad():
            _descend(weights, soft_moving, soft_fixed, bases, block, steps)
    return weights.detach(), factors


def label_velocity(
    moving: Tensor,
    fixed: Tensor,
    *,
    labels: Sequence[int],
    spacing_mm: Sequence[float],
    iterations: Sequence[int] = (25, 15),
) -> Tensor:
    """Registers two label maps without training and returns the velocity, which may be scaled, mixed and inverted."""
    spacing = _check_spacing(spacing_mm)
    weights, _ = _fit(moving, fixed, labels, spacing, iterations)
    bases = _bases(fixed.shape[2:], spacing, _FIT_SIGMA_MM, (1, 1, 1), fixed.device)
    return _to_voxels(_WEIGHT_MM * _expand(weights, bases), spacing)


def register_label_maps(
    moving: Tensor,
    fixed: Tensor,
    *,
    labels: Sequence[int],
    spacing_mm: Sequence[float],
    iterations: Sequence[int] = (25, 15),
) -> Tensor:
    spacing = _check_spacing(spacing_mm)
    weights, factors = _fit(moving, fixed, labels, spacing, iterations)
    bases = _bases(fixed.shape[2:], spacing, _FIT_SIGMA_MM, factors, fixed.device)
    block = [f * s for f, s in zip(factors, spacing, strict=True)]
    coarse = exponentiate(_to_voxels(_WEIGHT_MM * _expand(weights, bases), block))
    scale = torch.tensor(factors, device=coarse.device).view(1, 3, 1, 1, 1)
    centres = (identity_coordinates(fixed.shape[2:], device=coarse.device) - (scale - 1) / 2) / scale
    return sample(coarse * scale, centres)


def template_coordinates(
    template_label: Tensor,
    target_label: Tensor,
    *,
    labels: Sequence[int],
    spacing_mm: Sequence[float],
    iterations: Sequence[int] = (25, 15),
) -> Tensor:
    """Where to read a template so that its anatomy lies on the target: alignment, then registration, one interpolation.

    `sample(template_image, coordinates)` reads the image, `sample(template_label, coordinates, mode="nearest")` the map.
    """
    affine = align_extent(template_label, target_label, labels=labels)
    here = identity_coordinates(target_label.shape[2:], device=target_label.device)
    aligned = sample(template_label, _transform(affine, here), mode="nearest")
    displacement = register_label_maps(
        aligned, target_label, labels=labels, spacing_mm=spacing_mm, iterations=iterations
    )
    return _transform(affine, here + displacement)
