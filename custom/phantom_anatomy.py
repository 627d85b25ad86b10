"""Geometry of the cardiac CT phantom (layer 1): signed distances of heart, vessels and thorax, and the label map.

Shapes are written in *model* millimetres: an adult heart, RAS axes, origin at the centre of the left ventricle. A
`Frame` carries them into the scanner's *world* (RAS, mm, origin at the centre of the volume): scale, rotation and a
smooth random deformation. Signed distances are negative inside and in world millimetres. Structures exclude one another
by carving (`max(a, gap - b)`), so no voxel belongs to two. Coronary arteries are then routed over what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.interpolate import CubicSpline, PchipInterpolator
from skimage.graph import route_through_array

from custom.topology import betti_numbers, fill_cavities, largest_components

__all__ = ["INTENDED_BETTI", "LABELS", "Anatomy", "TopologyError", "build_anatomy"]

Array = NDArray[np.float32]

LABELS: dict[str, int] = {
    "myocardium": 1,
    "left_atrium": 2,
    "left_ventricle": 3,
    "right_atrium": 4,
    "right_ventricle": 5,
    "aorta": 6,
    "pulmonary_artery": 7,
    "appendage": 8,
    "coronaries": 9,
    "pulmonary_veins": 10,
}
"""Label ids of the public cardiac-CT numbering."""

INTENDED_BETTI: dict[int, tuple[int, int, int]] = {k: (1, 0, 0) for k in range(1, 9)} | {9: (2, 0, 0), 10: (4, 0, 0)}
"""(b0, b1, b2) of every label: balls, a left and a right coronary tree, four pulmonary veins."""

MODEL_FOV_MM = 172.0
MODEL_CENTRE = np.array([23.0, -13.0, 27.0])
FAR = 30.0

# Points of vessels in model mm; radii in model mm. Jittered per subject.
TUBES: dict[str, tuple[Sequence[Sequence[float]], Sequence[float]]] = {
    "aorta": (
        [[38, 4, 21], [42, 5, 32], [45, 4, 44], [50, 4, 62], [50, -2, 80], [42, -20, 96], [29, -45, 97], [20, -64, 84]]
        + [[17, -72, 62], [18, -74, 30], [23, -74, -10], [32, -73, -45], [38, -72, -80]],
        [11.5, 16.0, 13.5, 15.0, 14.5, 13.0, 12.0, 11.5, 11.0, 10.5, 10.5, 10.0, 10.0],
    ),
    "pulmonary_artery": (
        [[27, 21, 47], [23, 12, 58], [16, -8, 68], [6, -32, 71], [-6, -52, 66], [-16, -62, 54]],
        [12.5, 13.0, 12.0, 9.5, 8.0, 6.0],
    ),
    "right_pulmonary_artery": (
        [[18, -4, 68], [30, -20, 71], [52, -26, 70], [78, -30, 66], [100, -36, 58]],
        [10.5, 9.5, 9.0, 8.0, 5.5],
    ),
    "outflow": ([[16, 37, 8], [23, 37, 24], [27, 26, 40], [27, 20, 54]], [17.0, 16.0, 13.5, 12.0]),
    "lv_outflow": ([[20, 0, 8], [32, 3, 17], [40, 5, 26]], [13.0, 12.0, 11.0]),
    "inlet": ([[50, 16, 1], [34, 24, -6], [12, 30, -14]], [20.0, 20.0, 18.0]),
    "mitral": ([[44, -33, 27], [30, -24, 17], [22, -19, 12]], [22.0, 18.0, 16.0]),
    "appendage": ([[32, -32, 44], [20, -36, 51], [10, -31, 55], [7, -19, 55]], [9.0, 8.5, 8.5, 6.0]),
    "circumflex_room": ([[20, 5, 41], [12, -3, 43], [5, -13, 43], [-1, -23, 38]], [3.0, 3.0, 3.0, 3.0]),
    "vein_rs": ([[62, -38, 40], [80, -46, 48], [98, -52, 57], [112, -54, 66]], [8.0, 7.0, 5.5, 4.5]),
    "vein_ri": ([[62, -44, 24], [78, -56, 16], [94, -64, 6], [106, -70, -4]], [8.0, 7.0, 5.5, 4.5]),
    "vein_ls": ([[30, -42, 42], [12, -52, 52], [-6, -56, 58], [-22, -52, 64]], [7.5, 6.5, 5.0, 4.0]),
    "vein_li": ([[28, -46, 24], [8, -56, 22], [-8, -66, 14], [-22, -74, 4]], [7.5, 6.5, 5.0, 4.0]),
    "svc": ([[74, 2, 26], [77, -6, 52], [77, -8, 80], [74, -4, 120]], [10.0, 9.5, 9.0, 9.0]),
    "ivc": ([[68, -14, -12], [70, -22, -32], [70, -28, -75]], [12.0, 12.0, 12.5]),
    "trachea": ([[50, -44, 130], [50, -46, 88], [42, -52, 82], [20, -62, 62], [0, -70, 44]], [8.0, 8.0, 6.0, 5.5, 4.0]),
    "bronchus": ([[52, -46, 86], [66, -50, 76], [84, -54, 62], [96, -60, 44]], [7.0, 6.0, 5.0, 3.5]),
    "oesophagus": ([[44, -60, 130], [42, -66, 60], [40, -70, 20], [30, -62, -40], [20, -40, -75]], [6.5] * 5),
}


class TopologyError(RuntimeError):
    """The drawn geometry does not have the intended topology; draw another one."""


@dataclass
class Anatomy:
    """One subject's geometry on a grid.

    Attributes:
        label: (H, W, D) uint8, ids of `LABELS`.
        layers: painted in this order; each {tissue: coverage in [0, 1] of shape (H, W, D)}, exclusive within a layer.
        surface_mm: (H, W, D) signed distance to the heart's blood pools, for appearance.
        points_mm: world positions of landmarks (RAS mm from the centre).
        parameters: what was drawn, json-serialisable.
    """

    label: NDArray[np.uint8]
    layers: list[dict[str, Array]]
    surface_mm: Array
    points_mm: dict[str, NDArray[np.float64]]
    parameters: dict[str, Any] = field(default_factory=dict)


class Frame:
    """Grid of voxel centres and the smooth map from world to model coordinates."""

    def __init__(self, shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator) -> None:
        self.shape, self.h = shape, spacing_mm
        self.axes = [((np.arange(n) - (n - 1) / 2) * spacing_mm).astype(np.float32) for n in shape]
        self.scale = min(1.0, min(shape) * spacing_mm / MODEL_FOV_MM) * rng.uniform(0.95, 1.0)
        self.stretch = rng.normal(1.0, 0.025, 3).clip(0.95, 1.05)
        angles = np.deg2rad(rng.normal(0.0, 3.0, 3).clip(-6, 6))
        self.rotation = _rotation(angles)
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
        return np.asarray(world) / self.h + (np.array(self.shape) - 1) / 2


def _rotation(angles: NDArray) -> NDArray[np.float64]:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ ry @ rx


def _unit(v: Any) -> NDArray[np.float64]:
    v = np.asarray(v, dtype=np.float64)
    return v / np.linalg.norm(v)


def _dot(grid: list[Array], centre: Any, direction: Any) -> Array:
    x, y, z = ((grid[i] - np.float32(centre[i])) * np.float32(direction[i]) for i in range(3))
    return x + y + z


def _ellipsoid(grid: list[Array], centre: Any, rows: NDArray, radii: Any) -> Array:
    """Signed distance k0 (k0 - 1) / k1, k0 = |p/r|, k1 = |p/r^2|: exact to first order at the surface."""
    q = [_dot(grid, centre, rows[i]) / np.float32(radii[i]) for i in range(3)]
    k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + np.float32(1e-3)
    k1 = np.sqrt(sum((q[i] / np.float32(radii[i])) ** 2 for i in range(3))) + np.float32(1e-5)
    return k0 * (k0 - 1) / k1


def _smooth_min(a: Array, b: Array, k: float) -> Array:
    """Polynomial smooth union with blending width k."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * np.float32(k / 4)


def _smooth_max(a: Array, b: Array, k: float) -> Array:
    return -_smooth_min(-a, -b, k)


def _carve(a: Array, *others: tuple[Array, float]) -> Array:
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


def draw_tube(frame: Frame, points: NDArray, radii: NDArray, *, out: Array | None = None, reach: float = 9.0) -> Array:
    """Signed distance to a chain of cones (world mm), computed only within `reach` of it; FAR elsewhere."""
    out = np.full(frame.shape, FAR, np.float32) if out is None else out
    limit = np.array(frame.shape)
    for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
        pad = max(ra, rb) + reach
        lo = np.clip(np.floor(frame.to_index(np.minimum(a, b) - pad)), 0, limit).astype(int)
        hi = np.clip(np.ceil(frame.to_index(np.maximum(a, b) + pad)) + 1, 0, limit).astype(int)
        if (hi <= lo).any():
            continue
        box = tuple(slice(i, j) for i, j in zip(lo, hi, strict=True))
        ab = b - a
        x, y, z = np.ix_(*(frame.axes[i][box[i]] - np.float32(a[i]) for i in range(3)))
        u = np.clip((x * ab[0] + y * ab[1] + z * ab[2]) / max(float(ab @ ab), 1e-6), 0, 1).astype(np.float32)
        d = np.sqrt((x - u * ab[0]) ** 2 + (y - u * ab[1]) ** 2 + (z - u * ab[2]) ** 2) - (ra + u * (rb - ra))
        np.minimum(out[box], d, out=out[box])
    return out


def _jitter(rng: np.random.Generator, points: Sequence[Sequence[float]], sd_mm: float) -> NDArray[np.float64]:
    return np.asarray(points, dtype=np.float64) + rng.normal(0.0, sd_mm, (len(points), 3)).clip(-2 * sd_mm, 2 * sd_mm)


def _draw_shape(rng: np.random.Generator) -> dict[str, Any]:
    """Random measures of one subject, model mm."""
    return {
        "axis": _unit(np.array([-0.68, 0.62, -0.38]) + rng.normal(0, 0.05, 3)).tolist(),
        "lv_radius": rng.uniform(21.5, 26.0),
        "lv_length": rng.uniform(46.0, 52.0),
        "wall": rng.uniform(8.5, 11.5),
        "la_radii": rng.uniform([28, 22, 25], [33, 27, 30]).tolist(),
        "ra_radii": rng.uniform([21, 28, 31], [25, 33, 36]).tolist(),
        "rv_radii": rng.uniform([45, 24, 27], [49, 29, 31]).tolist(),
        "aorta_factor": rng.uniform(0.92, 1.1),
        "vessel_factor": rng.uniform(0.92, 1.1),
        "rv_wall": rng.uniform(2.5, 3.5),
        "atrial_wall": rng.uniform(1.6, 2.3),
        "trabeculae": rng.uniform(0.3, 0.8),
        "epicardial_fat": rng.uniform(2.5, 7.0),
        "cardiac_dome": rng.uniform(-39.0, -35.0),
    }


def _lv_frame(axis: Any) -> tuple[NDArray, NDArray, NDArray]:
    """Orthonormal rows: towards the apex, towards the septum (right-anterior), and towards the anterior wall."""
    a = np.asarray(axis)
    septal = np.array([0.6, 0.8, 0.0])
    e1 = _unit(septal - (septal @ a) * a)
    e2 = np.cross(a, e1)
    return a, e1, e2 * np.sign(e2[2])


LV_CENTRE_T, LV_BASE_T = -12.0, -33.0
VALVE_POINT, VALVE_NORMAL = np.array([46.0, 20.0, 0.0]), _unit([-0.78, 0.58, -0.22])


def _vessels(
    frame: Frame, shape: dict[str, Any], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, NDArray]]:
    """Signed distances and world centrelines of all tubes of `TUBES`."""
    distance, curve = {}, {}
    for name, (points, radii) in TUBES.items():
        world = frame.to_world(_jitter(rng, points, 1.2))
        factor = shape["aorta_factor"] if name == "aorta" else shape["vessel_factor"]
        line, r = spline(world, np.asarray(radii) * factor * frame.scale, 3.0)
        distance[name], curve[name] = draw_tube(frame, line, r), line
    return distance, curve


def _heart(
    frame: Frame, grid: list[Array], shape: dict[str, Any], tube: dict[str, Array], rng: np.random.Generator
) -> tuple[dict[str, Array], Array]:
    """Signed distances (world mm) of all labels but coronaries, mutually exclusive; and of the whole left ventricle."""
    s = np.float32(frame.scale)
    rows = np.stack(_lv_frame(shape["axis"]))
    centre = LV_CENTRE_T * rows[0]
    r, length, wall = shape["lv_radius"], shape["lv_length"], shape["wall"]
    k = rng.normal(size=(10, 3))
    k = k / np.linalg.norm(k, axis=1, keepdims=True) * (2 * np.pi / rng.uniform(8, 18, 10) / frame.scale)[:, None]
    rough = np.float32(shape["trabeculae"] * 0.45) * sum(frame.waves(k, rng.uniform(0, 6.28, 10)))
    t = _dot(grid, (0, 0, 0), rows[0])
    base = (LV_BASE_T - t) * s
    endo = _ellipsoid(grid, centre, rows, (length, r, r)) * s
    for angle in (2.2, 3.9):  # papillary muscles: ridges of the free wall
        foot = np.cos(angle) * rows[1] + np.sin(angle) * rows[2]
        line = np.array([20 * rows[0] + (0.72 * r) * foot, -4 * rows[0] + (0.80 * r) * foot])
        endo = _smooth_max(endo, -draw_tube(frame, frame.to_world(line), np.full(2, 4.5) * s), 3.0)
    solid = _smooth_max(_ellipsoid(grid, centre, rows, (length + 0.75 * wall, r + wall, r + wall)) * s, base, 9.0)
    ao = tube["aorta"]
    d: dict[str, Array] = {"aorta": ao}
    d["left_ventricle"] = _carve(
        _smooth_min(_smooth_max(endo + 0.7 * rough, base, 7.0), tube["lv_outflow"], 3.0), (ao, 0.0)
    )
    d["myocardium"] = _carve(solid, (d["left_ventricle"], 0.0), (ao, 0.0), (tube["lv_outflow"], 0.0))
    la = _smooth_min(_ellipsoid(grid, (46, -35, 29), np.eye(3), shape["la_radii"]) * s, tube["mitral"], 5.0)
    taken = [(ao, 1.8), (solid, 0.0), (d["left_ventricle"], 0.0), (tube["lv_outflow"], 1.0), (tube["oesophagus"], 1.5)]
    d["left_atrium"] = _carve(la, *taken)
    side = _dot(grid, VALVE_POINT, VALVE_NORMAL) * s
    others = [(ao, 2.0), (d["left_atrium"], 2.5), (tube["lv_outflow"], 2.5), (d["left_ventricle"], 2.5)]
    ra = _smooth_min(_ellipsoid(grid, (67, 5, 8), np.eye(3), shape["ra_radii"]) * s, tube["svc"], 5.0)
    ra = np.maximum(ra, _dot(grid, (0, 0, 46), (0, 0, 1)) * s)
    d["right_atrium"] = _carve(np.maximum(ra + 0.6 * rough, side), *others, (solid, 1.0))
    body = _ellipsoid(grid, (15, 27, -7), rows, shape["rv_radii"]) * s
    body = np.maximum(_smooth_min(body, tube["inlet"], 6.0), -side)
    rv = _smooth_min(body, tube["outflow"], 8.0)
    pulmonary_valve = _dot(grid, (27, 22, 46), (-0.1, -0.35, 0.93)) * s
    rv = np.maximum(rv, pulmonary_valve)
    d["right_ventricle"] = _carve(rv + rough, (solid, 0.0), *others, (d["right_atrium"], 0.0))
    pa = np.maximum(_smooth_min(tube["pulmonary_artery"], tube["right_pulmonary_artery"], 3.0), -pulmonary_valve)
    d["pulmonary_artery"] = _carve(
        pa, (ao, 2.2), (d["left_atrium"], 2.2), (d["right_ventricle"], 0.0), (tube["svc"], 2.0)
    )
    clear = [(d["pulmonary_artery"], 2.2), (ao, 2.2)]
    room = [(d["pulmonary_artery"], 2.5), (ao, 8.0), (tube["circumflex_room"], 3.5)]
    laa = np.minimum(tube["appendage"] + rough, tube["appendage"] + 2.5)
    d["appendage"] = _carve(laa, *room, (d["left_atrium"], 0.0), (solid, 5.5), (d["right_ventricle"], 3.0))
    veins = [tube[n] for n in ("vein_rs", "vein_ri", "vein_ls", "vein_li")]
    gaps = [
        *clear,
        (d["left_atrium"], 0.0),
        (d["appendage"], 2.2),
        (solid, 2.0),
        (tube["svc"], 2.0),
        (d["right_atrium"], 2.0),
    ]
    d["pulmonary_veins"] = _carve(np.minimum.reduce(veins), *gaps)
    return d, solid


class _Outside:
    """Signed distance to everything a coronary artery must stay outside of, sampled anywhere."""

    def __init__(self, frame: Frame, distance: Array) -> None:
        self.frame, self.distance = frame, distance

    def __call__(self, world: NDArray) -> NDArray[np.float64]:
        return ndimage.map_coordinates(self.distance, self.frame.to_index(world).T, order=1, mode="nearest")

    def normal(self, world: NDArray) -> NDArray[np.float64]:
        """Unit gradient by central differences over one voxel."""
        step = np.eye(3) * self.frame.h
        g = np.stack([self(world + e) - self(world - e) for e in step], axis=1)
        return g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-6)

    def first_exit(self, start: NDArray, end: NDArray, offset_mm: float) -> NDArray[np.float64]:
        """First point on the ray start -> end that is `offset_mm` outside."""
        ray = start + np.linspace(0, 1, 160)[:, None] * (end - start)
        return ray[int(np.argmax(self(ray) >= offset_mm))]

    def route(self, start: NDArray, end: NDArray, offset_mm: float) -> NDArray[np.float64]:
        """Cheapest voxel path between two points through the space outside."""
        i, j = (np.rint(self.frame.to_index(p)).astype(int) for p in (start, end))
        lo = np.maximum(np.minimum(i, j) - 8, 0)
        hi = np.minimum(np.maximum(i, j) + 9, self.frame.shape)
        d = self.distance[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]
        cost = 1.0 + 0.1 * (d - offset_mm) ** 2 + 40.0 * (d < 0.5 * offset_mm)
        path, _ = route_through_array(cost, i - lo, j - lo, fully_connected=True, geometric=True)
        if len(path) > 1.5 * np.abs(i - j).max() + 8:
            raise TopologyError("a coronary artery finds no direct way over the heart")
        return (np.asarray(path) + lo - (np.array(self.frame.shape) - 1) / 2) * self.frame.h

    def hug(self, curve: NDArray, offset_mm: float, *, fixed: int = 1) -> NDArray[np.float64]:
        """Smooths a curve and pulls it to `offset_mm` outside; the first `fixed` points stay."""
        p = spline(curve, np.zeros(len(curve)), 2.0)[0] if len(curve) > 3 else curve
        for _ in range(14):
            q = p.copy()
            q[1:-1] = 0.25 * p[:-2] + 0.5 * p[1:-1] + 0.25 * p[2:]
            q += 0.7 * np.clip(offset_mm - self(q), -2.0, 2.0)[:, None] * self.normal(q)
            p[fixed:] = q[fixed:]
        return p


def _insertions(frame: Frame, shape: dict[str, Any], rv: Array) -> tuple[NDArray, NDArray, NDArray]:
    """Depth t and the angles where the right ventricle leaves the left one, in front (LAD) and below (PDA)."""
    rows = np.stack(_lv_frame(shape["axis"]))
    ts, phis = np.linspace(-26.0, 36.0, 16), np.linspace(-np.pi, np.pi, 121)
    r = (shape["lv_radius"] + shape["wall"]) * np.sqrt(
        1 - ((ts - LV_CENTRE_T) / (shape["lv_length"] + 0.75 * shape["wall"])) ** 2
    )
    ring = np.cos(phis)[:, None] * rows[1] + np.sin(phis)[:, None] * rows[2]
    p = ts[:, None, None] * rows[0] + r[:, None, None] * ring
    near = _Outside(frame, rv)(frame.to_world(p.reshape(-1, 3))).reshape(len(ts), -1) < 3.5 * frame.scale
    near &= np.abs(phis) < 2.6
    ok = near.any(axis=1) & (np.arange(len(ts)) > 0)
    if ok.sum() < 4:
        raise TopologyError("the right ventricle does not wrap around the septum")
    front = np.array([phis[n].max() if n.any() else 0 for n in near])
    below = np.array([phis[n].min() if n.any() else 0 for n in near])
    fit = [
        np.clip(np.polyval(np.polyfit(ts[ok], v[ok], 2), ts.clip(ts[ok].min(), ts[ok].max())), -2.4, 2.4)
        for v in (front, below)
    ]
    return ts, fit[0], fit[1]


class _Survey:
    """Places on the heart where coronary arteries run, found by rays that leave it."""

    def __init__(
        self, frame: Frame, shape: dict[str, Any], rv: Array, wall: Array, offset_mm: float, rng: np.random.Generator
    ) -> None:
        self.frame, self.shape, self.rng, self.offset = frame, shape, rng, offset_mm
        self.outside = _Outside(frame, wall)
        self.rows = np.stack(_lv_frame(shape["axis"]))
        self.t, self.front, self.below = _insertions(frame, shape, rv)

    def on_lv(self, t: float, phi: float, turn: float = 0.0) -> NDArray[np.float64]:
        """Point outside the left ventricle; turns away from whatever else covers it, by steps of `turn`."""
        a, e1, e2 = self.rows
        start = self.frame.to_world(t * a)[0]
        near = (self.shape["lv_radius"] + self.shape["wall"] + 4.0) * self.frame.scale + self.offset
        for _ in range(9 if turn else 1):
            end = self.frame.to_world(t * a + 75 * (np.cos(phi) * e1 + np.sin(phi) * e2))[0]
            p = self.outside.first_exit(start, end, self.offset)
            if np.linalg.norm(p - start) < near:
                break
            phi += turn
        return p

    def groove(self, values: NDArray, depths: NDArray, turn: float) -> NDArray[np.float64]:
        """Interventricular groove, in front or below, wriggling a little to the left ventricle's side of it."""
        phi = np.interp(depths, self.t, values) + 1.1 * turn + self.rng.normal(0, 0.04, len(depths))
        return np.array([self.on_lv(t, p, turn) for t, p in zip(depths, phi, strict=True)])

    def on_ring(self, phi: float) -> NDArray[np.float64]:
        """Point of the right atrioventricular groove; phi = 0 right and in front, pi / 2 below, pi behind."""
        right = np.array([0.55, 0.83, 0.0])
        u = _unit(right - (right @ VALVE_NORMAL) * VALVE_NORMAL)
        v = np.cross(VALVE_NORMAL, u)
        v = v * -np.sign(v[2])
        ray = np.stack([VALVE_POINT, VALVE_POINT + 80 * (np.cos(phi) * u + np.sin(phi) * v)])
        start, end = self.frame.to_world(ray)
        return self.outside.first_exit(start, end, self.offset)

    def leave_aorta(self, towards: list[float], target: NDArray) -> NDArray[np.float64]:
        """From inside the aortic sinus through its wall and over the surface to the target."""
        root, far = self.frame.to_world([[42.5, 5, 33], towards])
        v = _unit(far - root)
        ostium = root + v * 15.0 * self.shape["aorta_factor"] * self.frame.scale
        path = self.outside.route(ostium + v * (self.offset + 0.8), target, self.offset)
        return np.concatenate([[ostium - v, ostium], path])

    def over_rv(self, start: NDArray) -> NDArray[np.float64]:
        """Over the free wall of the right ventricle, from the groove towards the apex."""
        apex = self.frame.to_world(34 * self.rows[0] + 26 * self.rows[1])[0]
        core = self.frame.to_world([22, 26, -8])[0]
        line = start + np.linspace(0.12, 0.75, 8)[:, None] * (apex - start)
        rays = [(core + 0.3 * (p - core), core + 2.5 * (p - core)) for p in line]
        return np.array([self.outside.first_exit(a, b, self.offset) for a, b in rays])


# World lengths per scale that a main artery must have; what lies outside took a detour or broke off.
LENGTHS_MM = {"LAD": (66.0, 135.0), "LCX": (45.0, 125.0), "RCA": (85.0, 190.0)}

Branch = tuple[str, NDArray[np.float64], NDArray[np.float64]]


def _coronary_curves(survey: _Survey, size: float, rng: np.random.Generator) -> list[Branch]:
    """World centrelines and radii (mm) of both trees: (name, points, radii), a parent before its branches."""
    s, off, hug = survey.frame.scale, survey.offset, survey.outside.hug
    lad = _steady(survey.groove(survey.front, np.arange(-20.0, 43.0, 4.0), 0.1), 15 * s)
    left = hug(np.concatenate([survey.leave_aorta([20, 2, 36], lad[0]), lad]), off, fixed=2)
    arc = np.r_[0, np.cumsum(np.linalg.norm(np.diff(left, axis=0), axis=1))]
    split = min(int(np.searchsorted(arc, np.clip(rng.normal(10.5, 2.0), 7, 14) * s + 1.0)), len(left) - 1)
    phi = np.interp(-24, survey.t, survey.front) + np.linspace(0.6, rng.uniform(2.3, 2.9), 7)
    ring = np.array([survey.on_lv(t, p) for t, p in zip(np.linspace(-27, -30, 7), phi, strict=True)])
    lcx = np.concatenate([left[split - 1 : split + 1], survey.outside.route(left[split], ring[0], off), ring])
    rca = np.array([survey.on_ring(p) for p in np.linspace(-0.9, 2.5, 12)])
    rca = np.concatenate([survey.leave_aorta([46, 32, 36], rca[0]), rca])
    curves = {"LAD": left, "LCX": hug(lcx, off, fixed=2), "RCA": hug(rca, off, fixed=2)}
    for name, curve in curves.items():
        low, high = LENGTHS_MM[name]
        if not low <= (length := _length(curve) / s) <= high:
            raise TopologyError(f"{name} is {length:.0f} mm long, possible are {low:.0f}-{high:.0f}")
    r_lm, r_lad = size * rng.normal(2.25, 0.15), size * rng.normal(1.85, 0.12)
    r_lcx = max(1.2 * size, max(r_lm**3 - r_lad**3, 1.0) ** (1 / 3))  # Murray: r0^3 = r1^3 + r2^3
    radii = {name: np.full(len(curve), r_lcx) for name, curve in curves.items()}
    radii["LAD"] = np.where(np.arange(len(left)) <= split, r_lm, r_lad)
    radii["RCA"][:] = size * rng.normal(1.95, 0.15)
    return _attach(curves, radii, _side_branches(survey, phi, rng), survey, size, rng)


def _side_branches(survey: _Survey, ring_phi: NDArray, rng: np.random.Generator) -> list[tuple[str, str, NDArray]]:
    """Waypoints of the side branches: (name, parent, points)."""
    below = np.arange(-20.0, rng.uniform(14, 30), 4.0)
    side = [("PDA", "RCA", survey.groove(survey.below, below, -0.1))]
    for n, t in enumerate((-10.0, 4.0)):
        phi = float(np.interp(t, survey.t, survey.front))
        points = [survey.on_lv(t + 3 + 4 * i, phi + 0.25 + 0.17 * i) for i in range(1, 7)]
        side.append((f"D{n + 1}", "LAD", np.array(points)))
    for n, share in enumerate((0.35, 0.75)):
        phi = float(ring_phi[0] + share * (ring_phi[-1] - ring_phi[0]))
        side.append((f"OM{n + 1}", "LCX", np.array([survey.on_lv(-26 + 5 * i, phi + 0.06 * i) for i in range(1, 8)])))
    return [*side, ("AM", "RCA", survey.over_rv(survey.on_ring(0.7)))]


def _length(points: NDArray) -> float:
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def _steady(points: NDArray, limit_mm: float) -> NDArray:
    """Points up to the first jump longer than the limit: where a ray met another structure."""
    jumps = np.linalg.norm(np.diff(points, axis=0), axis=1) > limit_mm
    return points[: int(np.argmax(jumps)) + 1] if jumps.any() else points


def _attach(
    curves: dict[str, NDArray],
    radii: dict[str, NDArray],
    side: list[tuple[str, str, NDArray]],
    survey: _Survey,
    size: float,
    rng: np.random.Generator,
) -> list[Branch]:
    """Joins side branches to the nearest point of their parent, which narrows by Murray's law r0^3 = r1^3 + r2^3."""
    branches = []
    for name, parent, points in side:
        line, radius = curves[parent], radii[parent]
        n = len(line) - 1 if name == "PDA" else max(int(np.argmin(np.linalg.norm(line - points[0], axis=1))), 3)
        points = _steady(np.concatenate([line[n : n + 1], points]), 18.0)
        if len(points) < 3:
            continue
        r_branch = min(size * rng.uniform(0.85, 1.2), 0.85 * radius[n])
        radius[n + 1 :] *= max(1 - (r_branch / radius[n]) ** 3, 0.3) ** (1 / 3)
        curve = survey.outside.hug(points, survey.offset)
        branches.append((name, curve, np.linspace(r_branch, 0.75 * size, len(curve))))
    return [
        (name, curve, radii[name] * np.linspace(1.0, 0.72, len(curve))) for name, curve in curves.items()
    ] + branches


def _rasterise_tube(frame: Frame, points: NDArray, radii: NDArray) -> tuple[NDArray[np.bool_], Array]:
    """Voxels and signed distance of one artery; its centreline voxels are set, so it is connected on any grid."""
    distance = draw_tube(frame, points, radii, reach=3.0 + 2 * frame.h)
    fine, _ = spline(points, radii, 0.2 * frame.h)
    index = np.rint(frame.to_index(fine)).astype(int)
    index = index[((index >= 1) & (index < np.array(frame.shape) - 1)).all(axis=1)]
    mask = distance < 0
    mask[tuple(index.T)] = True
    return mask, distance


def _draw_coronaries(
    frame: Frame, curves: list, aorta: NDArray[np.bool_], heart: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], Array, list[str]]:
    """Draws branch by branch and keeps a side branch only while its tree stays a tree (one component, no loop)."""
    trees = {"left": np.zeros(frame.shape, bool), "right": np.zeros(frame.shape, bool)}
    distance, kept = np.full(frame.shape, FAR, np.float32), []
    for name, points, radii in curves:
        own, other = ("right", "left") if name in ("RCA", "PDA", "AM") else ("left", "right")
        forbidden = ndimage.binary_dilation(trees[other], np.ones((3, 3, 3)), iterations=2)
        for _ in range(6):
            mask, d = _rasterise_tube(frame, points, radii)
            mask &= ~heart
            if not trees[own].any():
                mask = largest_components(mask, 1)
            grown = fill_cavities(trees[own] | mask)
            if betti_numbers(grown) != (1, 0, 0):
                grown = fill_cavities(grown | (ndimage.binary_closing(grown, np.ones((3, 3, 3))) & ~heart))
            if betti_numbers(grown) == (1, 0, 0) and not (grown & forbidden).any():
                trees[own] = grown
                np.minimum(distance, d, out=distance)
                kept.append(name)
                break
            points, radii = points[:-4], radii[:-4]
            if len(points) < 6:
                break
    if not {"LAD", "LCX", "RCA"} <= set(kept):
        raise TopologyError(f"a main coronary artery is missing, drawn were {kept}")
    near = ndimage.binary_dilation(aorta, np.ones((3, 3, 3)))
    if not all((tree & near).any() for tree in trees.values()):
        raise TopologyError("a coronary tree does not reach the aorta")
    return trees["left"] | trees["right"], distance, kept


def _coverage(distance: Array, spacing_mm: float) -> Array:
    """Share of a voxel inside: the signed distance, anti-aliased over one voxel."""
    return np.clip(0.5 - distance / np.float32(spacing_mm), 0, 1)


def _enforce(mask: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    """Largest components, filled, handles closed by a small opening or closing; TopologyError if that is not enough."""
    wanted = INTENDED_BETTI[k]
    cross = ndimage.generate_binary_structure(3, 1)
    for repair in (lambda m: m, lambda m: ndimage.binary_opening(m, cross), lambda m: ndimage.binary_closing(m, cross)):
        candidate = fill_cavities(largest_components(repair(mask), wanted[0]))
        if betti_numbers(candidate) == wanted:
            return candidate
    raise TopologyError(f"label {k} has Betti numbers {betti_numbers(candidate)}, intended {wanted}")


def _labels(frame: Frame, d: dict[str, Array], coronaries: NDArray[np.bool_]) -> NDArray[np.uint8]:
    label = np.zeros(frame.shape, np.uint8)
    for name, distance in d.items():
        label[_enforce((distance <= 0) & ~coronaries & (label == 0), LABELS[name])] = LABELS[name]
    label[coronaries] = LABELS["coronaries"]
    for k, wanted in INTENDED_BETTI.items():
        if (found := betti_numbers(label == k)) != wanted:
            raise TopologyError(f"label {k} has Betti numbers {found}, intended {wanted}")
    return label


def _thorax(
    frame: Frame, grid: list[Array], shape: dict[str, Any], rng: np.random.Generator
) -> list[tuple[str, Array]]:
    """Layers behind the heart: fat, muscle, lung, abdomen, bones (signed distances, world mm)."""
    s = np.float32(frame.scale)
    x, y, z = grid
    hull = (np.sqrt(((x - 52) / 132) ** 2 + ((y + 16) / 84) ** 2) - 1) * 84 * s
    spine = np.array([58.0, -97.0, 0.0]) + rng.normal(0, 2, 3)
    rib = np.abs((z + 0.55 * y + 0.1 * np.abs(x - 52) + rng.uniform(0, 27)) % 27 - 13.5) * s
    ribs = (np.hypot((hull + 3) / 3.2, np.where(np.abs(x - 52) > 20, rib / 5.5, 9)) - 1) * 3.2
    sternum = ((((x - 52) / 17) ** 4 + ((y - 63) / 5.5) ** 4) ** 0.25 - 1) * 5.5 * s
    body = (np.sqrt((x - spine[0]) ** 2 + 1.25 * (y - spine[1]) ** 2) - 19 + 1.5 * np.cos(2 * np.pi * z / 28)) * s
    level = np.abs(z % 28 - 14) - 11.5
    dome = shape["cardiac_dome"] + 22 * np.exp(-(((x - 112) / 45) ** 2 + ((y + 25) / 55) ** 2))
    dome += 8 * np.exp(-(((x + 60) / 40) ** 2 + ((y + 30) / 50) ** 2)) - 0.0022 * (y - 10) ** 2
    below = (z - dome) * s
    stomach = np.maximum(below + 3, (x + 5) * s)
    gas = _ellipsoid(grid, (-30 + rng.normal(0, 5), 15, -66), np.eye(3), (22, 24, 10)) * s
    return [
        ("fat", hull - 26),
        ("muscle", hull - rng.uniform(7, 12)),
        ("lung", hull + 7),
        ("vessels", below),
        ("diaphragm", below),
        ("liver", np.maximum(below + 2, -(x - 2) * s)),
        ("viscera", stomach),
        ("gas", np.maximum(gas, below + 5)),
        ("mediastinum", below),
        ("spine_muscle", body - 5 * s),
        ("cortex", np.maximum(body, level * s)),
        ("marrow", np.maximum(body, level * s) + 1.8),
        ("disc", np.maximum(body, -level * s)),
        ("cortex", ribs),
        ("marrow", ribs + 1.6),
        ("cortex", sternum),
        ("marrow", sternum + 1.8),
    ]


def _lung_vessels(frame: Frame, curve: dict[str, NDArray], rng: np.random.Generator) -> Array:
    """Random branching trees in the lungs: from the ends of pulmonary veins and arteries, and all around each hilum."""
    out, s = np.full(frame.shape, FAR, np.float32), frame.scale
    stack = []
    for name in ("vein_rs", "vein_ri", "vein_ls", "vein_li", "pulmonary_artery", "right_pulmonary_artery"):
        start, heading = curve[name][-1], _unit(curve[name][-1] - curve[name][-3])
        stack += [(start, _unit(heading + rng.normal(0, 0.6, 3)), 3.0 * s, 18.0 * s, 0) for _ in range(2)]
    for hilum, outwards, count in (([98, -50, 45], [0.6, 0, 0], 8), ([-4, -52, 45], [-0.5, 0.1, 0], 22)):
        for v in rng.normal(size=(count, 3)) * [0.7, 0.8, 1.2] + outwards:
            v = _unit(v)
            start = frame.to_world(np.asarray(hilum) + rng.uniform(4, 40) * v, rotated=False)[0]
            stack.append((start, v, rng.uniform(1.8, 3.0) * s, 17.0 * s, 1))
    while stack:
        p, v, r, length, depth = stack.pop()
        end = p + length * _unit(v + rng.normal(0, 0.15, 3))
        draw_tube(frame, np.stack([p, end]), np.array([r, 0.85 * r]), out=out, reach=2.0)
        if depth < 5:
            for ratio in (0.84, rng.uniform(0.55, 0.75)):
                turned = _unit(v + rng.normal(0, 0.45 / (0.4 + ratio), 3))
                stack.append((end, turned, ratio * r, length * rng.uniform(0.7, 0.95), depth + 1))
    return out


def _assemble(
    frame: Frame, grids: tuple, shape: dict, d: dict, wall: Array, tube: dict, curve: dict, rng: np.random.Generator
) -> list[dict[str, Array]]:
    """All layers from the back to the front: coverages, of mutually exclusive tissues within a layer."""
    s, (x, y, _), height = frame.scale, grids[1], grids[0][2]
    airway = np.minimum(tube["trachea"], tube["bronchus"])
    soft = np.minimum.reduce([wall, tube["svc"] - 2, tube["ivc"] - 2, tube["oesophagus"] - 1, airway - 2])
    smooth = ndimage.gaussian_filter(np.clip(soft, -15, 25), 7.0 * s / frame.h)
    midline = np.maximum(np.abs(x - 50) - 9, 35 - np.abs(y)) * np.float32(s)
    special = {
        "vessels": _lung_vessels(frame, curve, rng),
        "mediastinum": _smooth_min(smooth - np.float32(shape["epicardial_fat"] * s), midline, 14.0),
    }
    front = [("airway_wall", airway - 1.5 * s), ("airway", airway), ("oesophagus", tube["oesophagus"]), ("wall", wall)]
    behind = [(name, special.get(name, distance)) for name, distance in _thorax(frame, grids[1], shape, rng)] + front
    layers = [{name: _coverage(distance, frame.h)} for name, distance in behind]
    layers.append({name: _coverage(distance, frame.h) for name, distance in d.items()})
    for name, ramp in (("svc", (height - 34) / 16), ("ivc", (-12 - height) / 16)):  # inflow mixes over 16 mm
        layers.append({name: _coverage(tube[name], frame.h) * np.clip(ramp, 0, 1)})
    return layers


def build_anatomy(shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator) -> Anatomy:
    """Draws one subject's geometry.

    Args:
        shape: (H, W, D), voxels along right, anterior, superior.
        spacing_mm: isotropic voxel size; the field of view must hold a heart (checked by `phantom.make_subject`).
        rng: all randomness of the geometry.

    Returns:
        Label map with the topology of `INTENDED_BETTI` and the layers to paint.

    Raises:
        TopologyError: if this draw cannot be given the intended topology; draw again.
    """
    frame = Frame(shape, spacing_mm, rng)
    measures = _draw_shape(rng)
    grids = frame.model_grids()
    tube, curve = _vessels(frame, measures, rng)
    d, solid = _heart(frame, grids[0], measures, tube, rng)
    s = np.float32(frame.scale)
    atria = np.minimum.reduce([d["left_atrium"], d["right_atrium"], d["appendage"]]) - measures["atrial_wall"] * s
    vessels = np.minimum.reduce([d["aorta"], d["pulmonary_artery"], d["pulmonary_veins"]]) - 1.5 * s
    wall = np.minimum.reduce([solid, d["right_ventricle"] - measures["rv_wall"] * s, atria, vessels])
    size = float(np.sqrt(s) * rng.uniform(0.92, 1.06))  # vessels shrink less than the heart
    survey = _Survey(frame, measures, d["right_ventricle"], wall, 1.9 * size + 0.6, rng)
    curves = _coronary_curves(survey, size, rng)
    coronaries, lumen, kept = _draw_coronaries(frame, curves, d["aorta"] < 0, np.minimum.reduce(list(d.values())) < 0)
    label = _labels(frame, d | {"myocardium": _carve(solid, (tube["lv_outflow"], 0.0))}, coronaries)
    layers = _assemble(frame, grids, measures, d, wall, tube, curve, rng)
    layers.append({"coronaries": _coverage(lumen, spacing_mm)})
    blood = np.minimum.reduce([v for n, v in d.items() if n != "myocardium"])
    lengths = {n: _length(p) for n, p, _ in curves if n in kept}
    parameters = frame.parameters | measures | {"coronary_size": size, "coronary_length_mm": lengths}
    return Anatomy(label, layers, blood, curve | {n: p for n, p, _ in curves}, parameters)
