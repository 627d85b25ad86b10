"""Coordinates and distance primitives of the cardiac CT phantom.

Shapes are written in *model* millimetres: an adult heart, RAS axes, origin at the centre of the left ventricle. A
`Frame` carries them into the scanner's *world* (RAS, mm, origin at the centre of the volume): scale, rotation and a
smooth random deformation. Signed distances are negative inside and in world millimetres. Structures exclude one another
by carving (`max(a, gap - b)`), so no voxel belongs to two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from custom.geometry.cones import lower_to_cones
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.spatial.transform import Rotation

Array = NDArray[np.float32]
# Ours, of the drawn heart: the field of view that holds it with its great vessels in life size, and the model position
# that lies in the centre of the volume, about their middle.
MODEL_FOV_MM = 172.0
MODEL_CENTRE = np.array([23.0, -13.0, 27.0])
FAR = 30.0  # mm; ours: beyond all distances that shape a tissue (25 mm, the fat around the heart)


@dataclass(frozen=True)
class Pose:
    """How a heart lies in the field of view, where it is not left to `Frame`.

    Attributes:
        scale: world mm of a model mm.
        angles_rad: rotation of the heart about the axes.
        origin_voxels: fractional index of the world's origin, where `MODEL_CENTRE` lies.
    """

    scale: float
    angles_rad: tuple[float, float, float]
    origin_voxels: tuple[float, float, float]


class Frame:
    """Grid of voxel centres and the smooth map from world to model coordinates."""

    def __init__(
        self, shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator, pose: Pose | None = None
    ) -> None:
        self.shape, self.h = shape, spacing_mm
        self.origin = (np.array(shape) - 1) / 2 if pose is None else np.array(pose.origin_voxels)
        self.axes = [
            ((np.arange(n) - o) * spacing_mm).astype(np.float32) for n, o in zip(shape, self.origin, strict=True)
        ]
        drawn = min(1.0, min(shape) * spacing_mm / MODEL_FOV_MM) * rng.uniform(0.95, 1.0)
        self.scale = drawn if pose is None else pose.scale
        self.stretch = rng.normal(1.0, 0.025, 3).clip(0.95, 1.05)
        angles = np.deg2rad(rng.normal(0.0, 3.0, 3).clip(-6, 6))
        angles = angles if pose is None else np.array(pose.angles_rad)
        self.rotation = Rotation.from_euler("xyz", angles).as_matrix()
        lengths = rng.uniform(60.0, 140.0, 8) * self.scale
        directions = rng.normal(size=(8, 3))
        self.k = 2 * np.pi * directions / np.linalg.norm(directions, axis=1, keepdims=True) / lengths[:, None]
        self.amplitude = rng.normal(0.0, 0.013, (8, 3)) * lengths[:, None]
        self.phase = rng.uniform(0, 2 * np.pi, 8)
        self.parameters = {"scale": self.scale, "stretch": self.stretch.tolist(), "angles_rad": angles.tolist()}

    def waves(self, k: NDArray, phase: NDArray) -> list[Array]:
        """Plane waves cos(k.x + phase) on the grid, by products of one-dimensional exponentials."""
        out = []
        for kk, ph in zip(k, phase, strict=True):
            ex, ey, ez = (np.exp(1j * kk[i] * self.axes[i]).astype(np.complex64) for i in range(3))
            plane = (ex[:, None] * ey[None]) * np.exp(1j * ph).astype(np.complex64)
            out.append(plane.real[..., None] * ez.real - plane.imag[..., None] * ez.imag)
        return out

    def model_grids(self) -> tuple[list[Array], list[Array]]:
        """Model coordinates of every voxel: of the rotated heart, and of the thorax that does not rotate."""
        waves = self.waves(self.k, self.phase)
        x = np.meshgrid(*self.axes, indexing="ij", copy=False)
        moved = [
            x[i] + sum(np.float32(a) * w for a, w in zip(self.amplitude[:, i], waves, strict=True)) for i in range(3)
        ]
        straight = [(moved[i] / np.float32(self.scale * self.stretch[i])).astype(np.float32) for i in range(3)]
        heart = [sum(np.float32(self.rotation[i, j]) * straight[j] for j in range(3)) for i in range(3)]
        centre = MODEL_CENTRE.astype(np.float32)
        return [heart[i] + centre[i] for i in range(3)], [straight[i] + centre[i] for i in range(3)]

    def to_world(self, model: ArrayLike, *, rotated: bool = True) -> NDArray[np.float64]:
        """World position (N, 3) of model points (N, 3): the map's inverse by fixed-point iteration."""
        p = np.atleast_2d(np.asarray(model, dtype=np.float64)) - MODEL_CENTRE
        target = (p @ self.rotation if rotated else p) * self.scale * self.stretch
        x = target
        for _ in range(12):
            x = target - np.cos(x @ self.k.T + self.phase) @ self.amplitude
        return x

    def to_index(self, world: NDArray) -> NDArray[np.float64]:
        """Fractional voxel index (N, 3) of world points."""
        return np.asarray(world) / self.h + self.origin


def unit(v: Any) -> NDArray[np.float64]:
    """Vector of length 1 in the direction of `v` (3,), which must not be zero."""
    v = np.asarray(v, dtype=np.float64)
    return v / np.linalg.norm(v)


def dot(grid: list[Array], centre: Any, direction: Any) -> Array:
    """Coordinate of every voxel along a direction (3,), from a centre (3,)."""
    x, y, z = ((grid[i] - np.float32(centre[i])) * np.float32(direction[i]) for i in range(3))
    return x + y + z


def ellipsoid(grid: list[Array], centre: Any, rows: NDArray, radii: Any) -> Array:
    """Signed distance k0 (k0 - 1) / k1, k0 = |p/r|, k1 = |p/r^2|: exact to first order at the surface."""
    q = [dot(grid, centre, rows[i]) / np.float32(radii[i]) for i in range(3)]
    k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + np.float32(1e-3)
    k1 = np.sqrt(sum((q[i] / np.float32(radii[i])) ** 2 for i in range(3))) + np.float32(1e-5)
    return k0 * (k0 - 1) / k1


def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Polynomial smooth union with blending width k."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * np.float32(k / 4)


def smooth_max(a: Array, b: Array, k: float) -> Array:
    """Polynomial smooth intersection with blending width k."""
    return -smooth_min(-a, -b, k)


def carve(a: Array, *others: tuple[Array, float]) -> Array:
    """Takes every `other`, grown by its gap, away from `a`."""
    for other, gap in others:
        a = np.maximum(a, np.float32(gap) - other)
    return a


def spline(points: NDArray, values: NDArray, step_mm: float) -> tuple[NDArray, NDArray]:
    """Resamples a curve (N, 3) and its radii (N,) at equal steps of a cubic spline through it."""
    keep = np.r_[True, np.linalg.norm(np.diff(points, axis=0), axis=1) > 1e-6]
    points, values = points[keep], values[keep]
    s = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    t = np.linspace(0.0, s[-1], max(2, int(np.ceil(s[-1] / step_mm)) + 1))
    return CubicSpline(s, points)(t), PchipInterpolator(s, values)(t)


def curve_length(points: NDArray) -> float:
    """Length of a curve through points (N, 3), in their unit; 0 of a single point."""
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def draw_tube(frame: Frame, points: NDArray, radii: NDArray, *, out: Array | None = None, reach: float = 9.0) -> Array:
    """Signed distance to a chain of cones (world mm), computed only within `reach` of it; FAR elsewhere."""
    out = np.full(frame.shape, FAR, np.float32) if out is None else out
    links = np.stack([np.arange(len(points) - 1), np.arange(1, len(points))], 1)
    spacing = (frame.h,) * 3
    lower_to_cones(out, points, radii, links, spacing_mm=spacing, origin_voxels=frame.origin.tolist(), reach_mm=reach)
    return out


def coverage(distance: Array, spacing_mm: float) -> Array:
    """Share of a voxel inside: the signed distance, anti-aliased over one voxel."""
    return np.clip(0.5 - distance / np.float32(spacing_mm), 0, 1)
