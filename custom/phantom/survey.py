"""Ways over the surface of the phantom's heart: where coronary arteries can run."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.geometry import Array, Frame, spline, unit
from custom.phantom.heart import LV_CENTRE_T, VALVE_NORMAL, VALVE_POINT, lv_frame
from custom.phantom.labels import TopologyError
from numpy.typing import NDArray
from scipy import ndimage
from skimage.graph import route_through_array


class Outside:
    """Signed distance to everything a coronary artery must stay outside of, sampled anywhere."""

    def __init__(self, frame: Frame, distance: Array) -> None:
        self.frame, self.distance = frame, distance

    def __call__(self, world: NDArray) -> NDArray[np.float64]:
        """Distance (N,) in mm at world points (N, 3), linear between voxels."""
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
        return (np.asarray(path) + lo - self.frame.origin) * self.frame.h

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
    rows = np.stack(lv_frame(shape["axis"]))
    ts, phis = np.linspace(-26.0, 36.0, 16), np.linspace(-np.pi, np.pi, 121)
    r = (shape["lv_radius"] + shape["wall"]) * np.sqrt(
        1 - ((ts - LV_CENTRE_T) / (shape["lv_length"] + 0.75 * shape["wall"])) ** 2
    )
    ring = np.cos(phis)[:, None] * rows[1] + np.sin(phis)[:, None] * rows[2]
    p = ts[:, None, None] * rows[0] + r[:, None, None] * ring
    near = Outside(frame, rv)(frame.to_world(p.reshape(-1, 3))).reshape(len(ts), -1) < 3.5 * frame.scale
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


class Survey:
    """Places on the heart where coronary arteries run, found by rays that leave it."""

    def __init__(
        self, frame: Frame, shape: dict[str, Any], rv: Array, wall: Array, offset_mm: float, rng: np.random.Generator
    ) -> None:
        self.frame, self.shape, self.rng, self.offset = frame, shape, rng, offset_mm
        self.outside = Outside(frame, wall)
        self.rows = np.stack(lv_frame(shape["axis"]))
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
        u = unit(right - (right @ VALVE_NORMAL) * VALVE_NORMAL)
        v = np.cross(VALVE_NORMAL, u)
        v = v * -np.sign(v[2])
        ray = np.stack([VALVE_POINT, VALVE_POINT + 80 * (np.cos(phi) * u + np.sin(phi) * v)])
        start, end = self.frame.to_world(ray)
        return self.outside.first_exit(start, end, self.offset)

    def leave_aorta(self, towards: list[float], target: NDArray) -> NDArray[np.float64]:
        """From inside the aortic sinus through its wall and over the surface to the target."""
        root, far = self.frame.to_world([[42.5, 5, 33], towards])
        v = unit(far - root)
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
