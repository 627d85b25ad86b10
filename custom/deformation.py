"""Smooth invertible deformations of 3D grids and training-free registration of label maps (layer 0, torch).

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
_FIT_SIGMA_MM = 12.0  # correlation length of a registration's velocity
_FIT_BLOCK_MM = 4.5  # finer of the two label grids of a registration; the coarser has blocks of twice that
_FIT_ITERATIONS = (12, 6)  # L-BFGS iterations on the coarser and the finer grid
_FIT_SQUARINGS = 3  # enough on blocks: a step is then within a block
_FIT_UNIT_MM = 10.0  # displacement that a weight of 1 stands for
_FIT_SMOOTHNESS = 1e-4  # price of a squared weight, against overlap losses of 0 to 1


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
            f"displacement must be on the grid {tuple(volume.shape[2:])} of volume, got "
            f"{tuple(displacement.shape[2:])}; for different grids pass coordinates to sample()."
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


def _checked_pair(moving: Tensor, fixed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Items (1, 1, H, W, D) of two batches, as plain tensors: MetaTensor's bookkeeping would cost more than the fit."""
    for name, label_map in (("moving", moving), ("fixed", fixed)):
        _check_volume(name, label_map, 1)
    if moving.shape[0] != fixed.shape[0]:
        raise ValueError(f"moving and fixed must have one batch size, got {moving.shape[0]} and {fixed.shape[0]}.")
    plain = [label_map.detach().as_subclass(Tensor) for label_map in (moving, fixed)]  # type: ignore[attr-defined]
    return list(zip(plain[0].split(1), plain[1].split(1), strict=True))


def _common_labels(moving: Tensor, fixed: Tensor, labels: Sequence[int]) -> list[int]:
    held = [set(torch.bincount(m.flatten().long()).nonzero()[:, 0].tolist()) - {0} for m in (moving, fixed)]
    common = [label for label in labels if label in held[0] & held[1]]
    if not common:
        raise ValueError(
            f"labels must name at least one label present in both maps, got {list(labels)} while moving holds "
            f"{sorted(held[0])} and fixed {sorted(held[1])}; choose other labels or another template."
        )
    return common


def _centre_and_extent(label_map: Tensor, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) in voxels, per axis, of the positions of labels of equal weight."""
    ids = label_map[0, 0].long()
    counts = torch.bincount(ids.flatten())
    weights = torch.zeros(len(counts), device=ids.device)
    weights[labels] = 1 / (len(labels) * counts[labels])
    density = weights[ids]
    means, deviations = [], []
    for axis in range(3):
        profile = density.sum([a for a in range(3) if a != axis]).double()
        position = torch.arange(len(profile), device=ids.device)
        means.append((profile * position).sum())
        deviations.append((profile * (position - means[-1]) ** 2).sum().sqrt())
    return torch.stack(means), torch.stack(deviations)


def align_extent(
    moving: Tensor, fixed: Tensor, *, labels: Sequence[int], scale_range: tuple[float, float] = (0.7, 1.4)
) -> Tensor:
    """Aligns position and size of some structures: matches their centre and standard deviation per axis. Ours.

    Each label weighs the same, however large: a long piece of aorta in one field of view would drag the heart along
    (measured on the real pair: mean Dice 0.31 with voxels weighing the same, 0.45 so). The maps may differ in shape but
    must share spacing and orientation (the caller resamples). Labels missing in either map are left out of both.

    Args:
        moving: (B, 1, h, w, d) integer labels.
        fixed: (B, 1, H, W, D) integer labels.
        labels: ids to align.
        scale_range: limits of the scale from fixed to moving along each axis. Structures one voxel thick keep scale 1.

    Returns:
        Affine (B, 3, 4) float32 that takes a position in `fixed` to the one to read in `moving`, both in voxels.

    Raises:
        ValueError: if a shape is wrong or no label is in both maps.
    """
    affines = []
    for source, target in _checked_pair(moving, fixed):
        common = _common_labels(source, target, labels)
        centre_m, deviation_m = _centre_and_extent(source, common)
        centre_f, deviation_f = _centre_and_extent(target, common)
        flat = (deviation_m < 0.25) | (deviation_f < 0.25)  # two voxels deviate by 0.5
        scale = torch.where(flat, 1.0, deviation_m / deviation_f).clamp(*scale_range)
        affines.append(torch.cat([scale.diag(), (centre_m - scale * centre_f)[:, None]], 1))
    return torch.stack(affines).float()


def _transform(affine: Tensor, coordinates: Tensor) -> Tensor:
    """Applies (B, 3, 4) to coordinates (B or 1, 3, H, W, D)."""
    moved = affine[:, :, :3] @ coordinates.flatten(2) + affine[:, :, 3:]
    return moved.unflatten(2, coordinates.shape[2:])


def _average(volume: Tensor, factors: Sequence[int]) -> Tensor:
    """Means over blocks of `factors` voxels; the last blocks repeat the border."""
    short = [-n % f for n, f in zip(volume.shape[2:], factors, strict=True)]
    padded = F.pad(volume, (0, short[2], 0, short[1], 0, short[0]), mode="replicate")
    return F.avg_pool3d(padded, tuple(factors))


def _blur(volume: Tensor) -> Tensor:
    """Two averages over 3^3 voxels: close to a Gaussian of standard deviation 1.15."""
    for _ in range(2):
        volume = F.avg_pool3d(F.pad(volume, (1,) * 6, mode="replicate"), 3, stride=1)
    return volume


def _overlap_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - soft Dice, 1 - 2 sum(ab) / sum(a^2 + b^2) of (1, L, H, W, D), mean over labels."""
    axes = (0, 2, 3, 4)
    return (1 - 2 * (a * b).sum(axes) / (a.square() + b.square()).sum(axes)).mean()


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
        displacement = exponentiate(_to_voxels(_expand(weights, bases) * _FIT_UNIT_MM, block), steps=_FIT_SQUARINGS)
        loss = _overlap_loss(warp(moving, displacement), fixed) + _FIT_SMOOTHNESS * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)


def _fit(moving: Tensor, fixed: Tensor, labels: Sequence[int], spacing: tuple[float, float, float]) -> Tensor:
    """Weights (1, 3, nodes) of the velocity that registers one item, coarse grid first."""
    common = _common_labels(moving, fixed, labels)
    shape = fixed.shape[2:]
    fine = _block_factors(spacing)
    soft = [torch.cat([_average((m == n).float(), fine) for n in common], 1) for m in (moving, fixed)]
    nodes = [basis.shape[1] for basis in _bases(shape, spacing, _FIT_SIGMA_MM, fine, fixed.device)]
    weights = torch.zeros(1, 3, *nodes, device=fixed.device, requires_grad=True)
    for coarser, steps in zip((2, 1), _FIT_ITERATIONS, strict=True):
        factors = [coarser * f for f in fine]
        block = [f * s for f, s in zip(factors, spacing, strict=True)]
        a, b = (_blur(_average(m, (coarser,) * 3)) for m in soft)
        _descend(weights, a, b, _bases(shape, spacing, _FIT_SIGMA_MM, factors, fixed.device), block, steps)
    return weights.detach()


def _block_factors(spacing: Sequence[float]) -> list[int]:
    return [max(1, round(_FIT_BLOCK_MM / s)) for s in spacing]


def _fitted_velocity(
    moving: Tensor, fixed: Tensor, labels: Sequence[int], spacing_mm: Sequence[float], factors: Sequence[int]
) -> Tensor:
    """Registers item by item and evaluates the velocity on blocks of `factors` voxels, in blocks."""
    spacing = _check_spacing(spacing_mm)
    if moving.shape[2:] != fixed.shape[2:]:
        raise ValueError(
            f"moving must be on the grid {tuple(fixed.shape[2:])} of fixed, got {tuple(moving.shape[2:])}; "
            "use template_coordinates(), which takes different grids."
        )
    with torch.inference_mode(False), torch.enable_grad():
        weights = torch.cat([_fit(m, f, labels, spacing) for m, f in _checked_pair(moving, fixed)])
    bases = _bases(fixed.shape[2:], spacing, _FIT_SIGMA_MM, factors, fixed.device)
    return _to_voxels(_expand(weights, bases) * _FIT_UNIT_MM, [f * s for f, s in zip(factors, spacing, strict=True)])


def label_velocity(moving: Tensor, fixed: Tensor, *, labels: Sequence[int], spacing_mm: Sequence[float]) -> Tensor:
    """Registers two label maps without training and returns the velocity, to be scaled, mixed or inverted. Ours.

    Soft Dice of blurred labels on blocks of 9, then 4.5 mm, plus the price of the field under the Gaussian model of
    `random_velocity` (its white weights, squared), minimised by L-BFGS. Deterministic; items do not see each other.

    Args:
        moving: (B, 1, H, W, D) integer labels, on the grid of `fixed`.
        fixed: (B, 1, H, W, D) integer labels.
        labels: ids to match; those missing in either map are ignored. Leave thin tubes out: blurring erases them.
        spacing_mm: voxel size along each axis, mm.

    Returns:
        (B, 3, H, W, D) in voxels; `warp(moving, exponentiate(velocity))` lies on `fixed`.

    Raises:
        ValueError: if a shape or the spacing is wrong, or an item has no label in both maps.
    """
    return _fitted_velocity(moving, fixed, labels, spacing_mm, (1, 1, 1))


def register_label_maps(moving: Tensor, fixed: Tensor, *, labels: Sequence[int], spacing_mm: Sequence[float]) -> Tensor:
    """Registers two label maps: `exponentiate(label_velocity(...))`, but with the exponential on the 4.5 mm blocks.

    The velocity is smooth over 12 mm, so enlarging its flow linearly differs from that by a fraction of a voxel
    (measured: 0.2 voxels of 1.5 mm on average) and spares 0.3 s at 96^3.

    Args:
        moving: (B, 1, H, W, D) integer labels, on the grid of `fixed`.
        fixed: (B, 1, H, W, D) integer labels.
        labels: ids to match; those missing in either map are ignored.
        spacing_mm: voxel size along each axis, mm.

    Returns:
        Displacement (B, 3, H, W, D) in voxels; `warp(moving, displacement)` lies on `fixed`.

    Raises:
        ValueError: if a shape or the spacing is wrong, or an item has no label in both maps.
    """
    factors = _block_factors(_check_spacing(spacing_mm))
    flow = exponentiate(_fitted_velocity(moving, fixed, labels, spacing_mm, factors))
    scale = torch.tensor(factors, device=flow.device).view(1, 3, 1, 1, 1)
    centres = (identity_coordinates(fixed.shape[2:], device=flow.device) - (scale - 1) / 2) / scale
    return sample(flow * scale, centres)


def template_coordinates(
    template_label: Tensor, target_label: Tensor, *, labels: Sequence[int], spacing_mm: Sequence[float]
) -> Tensor:
    """Finds where to read a template so that its anatomy lies on a target: alignment, then registration.

    Both are in one set of coordinates, so the image is interpolated once and its noise is not smoothed twice:
    `sample(template_image, coordinates)`, `sample(template_label, coordinates, mode="nearest")`.

    Args:
        template_label: (B, 1, h, w, d) integer labels; any grid shape, spacing and orientation of the target.
        target_label: (B, 1, H, W, D) integer labels.
        labels: ids to match; those missing in either map are ignored.
        spacing_mm: voxel size along each axis, mm, of both.

    Returns:
        Coordinates (B, 3, H, W, D) float32, in voxels of the template.

    Raises:
        ValueError: if a shape or the spacing is wrong, or an item has no label in both maps.
    """
    affine = align_extent(template_label, target_label, labels=labels)
    here = identity_coordinates(target_label.shape[2:], device=target_label.device)
    aligned = sample(template_label, _transform(affine, here), mode="nearest")
    displacement = register_label_maps(aligned, target_label, labels=labels, spacing_mm=spacing_mm)
    return _transform(affine, here + displacement)
