"""How new anatomies move: the options, mixtures of registrations, and what keeps them inside the grid.

Velocities are those of `custom.geometry.deformation`: (B, 3, H, W, D) in voxels, components in the order H, W, D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from custom.geometry.deformation import check_spacing, check_volume, sample
from custom.runs.options import is_number
from torch import Tensor

__all__ = ["Edits", "Motion", "carry_points", "confine", "from_options", "mixture_coefficients"]


@dataclass(frozen=True)
class Motion:
    """How far new anatomies are moved.

    Attributes:
        coarse_mm, coarse_sigma_mm: RMS length and correlation length of the larger random field.
        fine_mm, fine_sigma_mm: of the finer one.
        mixture_scale: factor of the registrations to other references; 0 leaves them out.
        margin_mm: from here on, motion fades towards the faces of the grid (`custom.masks.motion.confine`).
        shrink: factor of all motion after each rejection.
        retries: how often a rejected mask is drawn anew.
    """

    coarse_mm: float = 8.0
    coarse_sigma_mm: float = 30.0
    fine_mm: float = 2.0
    fine_sigma_mm: float = 12.0
    mixture_scale: float = 1.0
    margin_mm: float = 20.0
    shrink: float = 0.75
    retries: int = 6

    def __post_init__(self) -> None:
        for name in ("coarse_mm", "fine_mm", "mixture_scale", "margin_mm"):
            if getattr(self, name) < 0:
                raise ValueError(f"motion: {name} must not be negative, got {getattr(self, name)}.")
        for name in ("coarse_sigma_mm", "fine_sigma_mm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"motion: {name} must be positive, got {getattr(self, name)}.")
        if not 0 < self.shrink <= 1 or self.retries < 0:
            raise ValueError(
                f"motion: shrink must be in (0, 1] and retries at least 0, got {self.shrink}, {self.retries}."
            )

    def check_grid(self, spacing_mm: Sequence[float]) -> None:
        """Refuses fields finer than the voxels of a reference, naming the option."""
        for name in ("coarse_sigma_mm", "fine_sigma_mm"):
            if getattr(self, name) < max(spacing_mm):
                raise ValueError(
                    f"motion: {name} must be at least the voxel size of the reference, {max(spacing_mm):g} mm, got "
                    f"{getattr(self, name)}; raise it"
                )


@dataclass(frozen=True)
class Edits:
    """Random changes of vessel trees; the defaults change nothing.

    Attributes:
        prune_probability, prune_max_length_mm: see `custom.geometry.vessels.prune`.
        radius_range: lowest and highest factor of all radii of a label's vessels, drawn once a mask.
    """

    prune_probability: float = 0.0
    prune_max_length_mm: float = 40.0
    radius_range: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.prune_probability <= 1 or self.prune_max_length_mm < 0:
            raise ValueError(
                "edits: prune_probability must be 0 to 1 and prune_max_length_mm not negative, got "
                f"{self.prune_probability} and {self.prune_max_length_mm}."
            )
        if len(self.radius_range) != 2 or not 0 < self.radius_range[0] <= self.radius_range[1]:
            raise ValueError(f"edits: radius_range must be [lowest, highest] above 0, got {self.radius_range}.")


Kind = TypeVar("Kind", Motion, Edits)


def from_options(kind: type[Kind], name: str, options: Mapping[str, Any]) -> Kind:
    """Motion or edits from a config dictionary; what is not named keeps its default.

    Raises:
        ValueError: naming an unknown option and all that exist, or what is no number or out of range.
    """
    defaults: dict[str, Any] = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(defaults)):
        raise ValueError(f"{name}: {unknown} do not exist; the options are {list(defaults)}")
    for key, value in options.items():
        default = defaults[key]
        numbers, kinds = (value, (int, float)) if isinstance(default, tuple) else ([value], (int, type(default)))
        if not isinstance(numbers, (list, tuple)) or not all(isinstance(n, kinds) and is_number(n) for n in numbers):
            what = (
                "a whole number" if isinstance(default, int) else "a number, or a list of two where the default is one"
            )
            raise ValueError(f"{name}: {key} must be {what}, got {value!r}; the default is {default}")
    return kind(**options)


def confine(velocity: Tensor, *, spacing_mm: Sequence[float], margin_mm: float) -> Tensor:
    """Stops the flow through the faces of the grid: the grid is mapped onto itself and nothing leaves it. Ours.

    The component along each axis is faded to zero towards the two faces of that axis, by 3 t^2 - 2 t^3 over
    `margin_mm`; motion along a face stays.

    Args:
        velocity: (B, 3, H, W, D), in voxels.
        spacing_mm: voxel size along each axis, mm.
        margin_mm: where fading begins, mm from the outermost voxels; 0 stops only these.

    Returns:
        (B, 3, H, W, D), in voxels.

    Raises:
        ValueError: if a shape or a length is wrong.
    """
    check_volume("velocity", velocity, 3)
    if margin_mm < 0:
        raise ValueError(f"margin_mm must not be negative, got {margin_mm}.")
    confined = velocity.clone()
    for axis, (size, step) in enumerate(zip(velocity.shape[2:], check_spacing(spacing_mm), strict=True)):
        voxel = torch.arange(size, dtype=velocity.dtype, device=velocity.device)
        depth_mm = torch.minimum(voxel, size - 1 - voxel) * step
        t = (depth_mm / max(margin_mm, 1e-6)).clamp(max=1)
        shape = [1, 1, 1, 1]
        shape[axis + 1] = size
        confined[:, axis] *= (t * t * (3 - 2 * t)).view(shape)
    return confined


def carry_points(points: Tensor, velocity: Tensor, steps: int = 32) -> Tensor:
    """Moves points as `warp(volume, exponentiate(velocity))` moves voxels: along -velocity, midpoint rule.

    Args:
        points: (N, 3), in voxels of the grid.
        velocity: (1, 3, H, W, D), in voxels.
        steps: of the integration, at least 1.

    Returns:
        (N, 3), in voxels.

    Raises:
        ValueError: if a shape is wrong or `steps` is below 1.
    """
    check_volume("velocity", velocity, 3)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be (N, 3) in voxels, got shape {tuple(points.shape)}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")

    def speed(position: Tensor) -> Tensor:
        return sample(velocity, position.T[None, :, :, None, None])[0, :, :, 0, 0].T

    position = points.to(velocity.dtype)
    for _ in range(steps if len(points) else 0):
        middle = position - speed(position) / (2 * steps)
        position = position - speed(middle) / steps
    return position


def mixture_coefficients(weights: Tensor, generator: torch.Generator, *, max_z: float = 2.0) -> tuple[Tensor, Tensor]:
    """Draws how much of each registration goes into a new velocity.

    With one registration, of the source to another reference, a share between 0 and 1. With more, the principal
    components of the samples {no motion, w_1, ..., w_N} (the source is a reference, too): mean plus sum_k z_k s_k e_k,
    z_k standard normal within `max_z`, written as coefficients of w_1 ... w_N. Sums of stationary velocities are the
    log-Euclidean statistics of diffeomorphisms (Arsigny et al. 2006).

    Args:
        weights: (N, ...) of `custom.geometry.registration.velocity_weights`, N >= 1.
        generator: the only source of randomness.
        max_z: limit of each |z_k|, positive.

    Returns:
        coefficients (N,) of the registrations, and what was drawn: the share (1,), or z (N,), largest component first.

    Raises:
        ValueError: without registrations, or if `max_z` is not positive.
    """
    if len(weights) == 0:
        raise ValueError(
            "weights must hold at least one registration, got none; with one reference there is no mixture."
        )
    if max_z <= 0:
        raise ValueError(f"max_z must be positive, got {max_z}.")
    if len(weights) == 1:
        share = torch.rand(1, generator=generator)
        return share, share
    count = len(weights) + 1
    samples = torch.cat([torch.zeros_like(weights[:1]), weights]).flatten(1).double()
    centred = samples - samples.mean(0)
    _, directions = torch.linalg.eigh(centred @ centred.T)  # the rows sum to 0: the smallest eigenvalue is 0
    directions = directions.flip(1)[:, :-1]
    directions = directions - directions.mean(0)  # several eigenvalues are 0 when registrations depend on each other
    peak = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, peak).sign()  # an eigenvector's sign is arbitrary
    z = torch.randn(count - 1, generator=generator, dtype=torch.float64)
    while bool((outside := z.abs() > max_z).any()):
        z[outside] = torch.randn(int(outside.sum()), generator=generator, dtype=torch.float64)
    # s_k e_k = centred^T u_k / sqrt(count - 1), with u_k the eigenvectors of the Gram matrix, which sum to 0
    share_of_samples = 1 / count + directions @ z / (count - 1) ** 0.5
    return share_of_samples[1:].float(), z.float()
