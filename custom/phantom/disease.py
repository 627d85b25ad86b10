"""Plaques, stenoses and what has been put into a patient, painted over a clinic phantom; its label stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.geometry import FAR, Array, coverage, draw_tube, spline
from custom.phantom.mediastinum import from_descending_aorta
from custom.phantom.scene import Clinic
from custom.volumes.artefacts import PLAQUE_HU, blur_by_motion
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["add_disease", "add_motion"]

# Ours: how many subjects have it, after what a cardiac department sees; and its HU in the voxels that it fills.
SHARES = {"stents": 0.1, "leads": 0.08, "wires": 0.1, "stent_graft": 0.04, "motion": 0.25, "steps": 0.2}
_STENT_HU, _METAL_HU, _GRAFT_HU, _SKIN_LEAD_HU = (900.0, 1800.0), (2500.0, 7000.0), (900.0, 2200.0), (600.0, 2500.0)
_SOFT_HU = (20.0, 90.0)
_SLAB_MM = (28.0, 42.0)  # of a step-and-shoot scan


def _paint(hu: Array, distance: Array, value: float, spacing_mm: float, weight: float = 1.0) -> None:
    share = np.float32(weight) * coverage(distance, spacing_mm)
    hu += share * (np.float32(value) - hu)


def _tube(body: Clinic, points: NDArray, radius: Any) -> Array:
    """Signed distance to a tube through world points."""
    radii = np.broadcast_to(np.asarray(radius, float), len(points))
    return draw_tube(body.frame, points, radii, reach=2 * body.frame.h)


def _stretch(body: Clinic, name: str, length_mm: float, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A part of a coronary artery: points every half millimetre, and radii."""
    line, radius = spline(body.curves_mm[name], body.coronary_radii_mm[name], 0.5)
    count = min(int(length_mm / 0.5) + 2, len(line) - 1)
    start = int(rng.integers(min(8, len(line) - count), max(len(line) - count, 9)))
    return line[start : start + count], radius[start : start + count]


def _add_plaques(hu: Array, body: Clinic, lumen_hu: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Calcified balls in the wall, soft plaques that leave a narrower lumen; what was painted."""
    found: list[dict[str, Any]] = []
    names, h = list(body.coronary_radii_mm), body.frame.h
    burden = rng.random() ** 2  # most subjects have few
    for _ in range(rng.poisson(12 * burden)):
        name = str(rng.choice(names))
        points, radii = _stretch(body, name, 4.0, rng)
        turn = rng.normal(size=3)
        centre = points[0] + turn / np.linalg.norm(turn) * radii[0] * rng.uniform(0.5, 1.0)
        reach, value = rng.uniform(0.5, 1.7), rng.uniform(*PLAQUE_HU)
        _paint(hu, _tube(body, np.stack([centre, centre + points[-1] - points[0]]), reach), value, h)
        found.append({"artery": name, "kind": "calcified", "radius_mm": reach})
    for _ in range(rng.poisson(3 * burden)):
        name, narrowing = str(rng.choice(names)), rng.uniform(0.2, 0.9)
        points, radii = _stretch(body, name, rng.uniform(4, 14), rng)
        bulge = np.sin(np.linspace(0, np.pi, len(points)))
        _paint(hu, _tube(body, points, radii + 0.5 * bulge), rng.uniform(*_SOFT_HU), h)
        aside = rng.normal(0, 0.25, 3) * radii.mean() * bulge[:, None]
        _paint(hu, _tube(body, points + aside, radii * (1 - narrowing * bulge)), lumen_hu, h)
        found.append({"artery": name, "kind": "soft", "narrowing": narrowing})
    return found


def _add_stents(hu: Array, body: Clinic, rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    for _ in range(rng.integers(1, 4)):
        name, length = str(rng.choice([n for n in ("LAD", "LCX", "RCA") if n in body.curves_mm])), rng.uniform(8, 28)
        points, radii = _stretch(body, name, length, rng)
        shell: Array = np.abs(_tube(body, points, radii)) - np.float32(0.35)
        _paint(hu, shell, rng.uniform(*_STENT_HU), body.frame.h, 0.8)
        found.append({"artery": name, "length_mm": length})
    return found


def _centre(body: Clinic, name: str) -> NDArray:
    """Innermost place of a pool, world mm."""
    at = np.unravel_index(int(np.argmin(body.pools[name])), body.label.shape)
    return (np.array(at) - body.frame.origin) * body.frame.h


def _add_leads(hu: Array, body: Clinic, rng: np.random.Generator) -> int:
    """Pacemaker leads from the upper vena cava into the right ventricle and, in some, to the right atrium's wall."""
    down = body.curves_mm["svc"][::-1]
    atrium, ventricle = _centre(body, "right_atrium"), _centre(body, "right_ventricle")
    deep = body.pools["right_ventricle"] < -2.5 * body.frame.scale
    inside = (np.argwhere(deep) - body.frame.origin) * body.frame.h
    tip = inside[int(np.argmax((inside - ventricle) @ (ventricle - atrium)))] if len(inside) else ventricle
    courses = [np.concatenate([down[:-2:3], [atrium, 0.5 * (atrium + ventricle), ventricle, tip]])]
    if rng.random() < 0.6:
        courses.append(np.concatenate([down[:-2:3], [atrium + [6, 0, -4], atrium + [2, 20, 12]]]))
    for points in courses:
        line, _ = spline(points + rng.normal(0, 1.5, points.shape), np.zeros(len(points)), 2.0)
        _paint(hu, _tube(body, line, rng.uniform(0.7, 1.3)), rng.uniform(*_METAL_HU), body.frame.h)
    return len(courses)


def _add_wires(hu: Array, body: Clinic, rng: np.random.Generator) -> int:
    """Loops of wire around the sternum, knotted in front."""
    angle = np.linspace(0, 2 * np.pi, 25)
    heights = np.arange(rng.uniform(-25, -5), 110, rng.uniform(18, 26))
    distance = np.full(hu.shape, FAR, np.float32)
    for z in heights:
        sternum_y = body.sternum_y - 0.12 * max(float(z) - 20, 0.0)
        loop = np.stack([50 + 13 * np.cos(angle), sternum_y + 8.5 * np.sin(angle), z + 2 * np.sin(angle)], axis=1)
        knot = np.array([[50, sternum_y + 8.5, z], [53, sternum_y + 10, z + rng.uniform(-4, 4)]])
        for points in (loop, knot):
            world = body.frame.to_world(points + rng.normal(0, 0.4, points.shape), rotated=False)
            draw_tube(body.frame, world, np.full(len(world), 0.55), out=distance, reach=body.frame.h)
    _paint(hu, distance, rng.uniform(*_METAL_HU), body.frame.h)
    return len(heights)


def _add_stent_graft(hu: Array, body: Clinic, rng: np.random.Generator) -> float:
    """Struts in the wall of the descending aorta, in rings of zigzag; the length in mm."""
    x, y, behind = from_descending_aorta(body.frame, body.curves_mm["aorta"])
    length, z = rng.uniform(60, 150), body.frame.axes[2]
    top = body.curves_mm["aorta"][:, 2].max() - rng.uniform(20, 60)
    zigzag = np.abs(np.abs((z / 12) % 1 - 0.5) * 4 - 1 - np.sin(5 * np.arctan2(y, x))) * 1.6 - 1.2
    where = np.maximum(np.abs(z - top + length / 2) - length / 2, behind)
    struts = np.maximum.reduce([np.abs(body.pools["aorta"]) - 0.6, zigzag, where])
    _paint(hu, struts.astype(np.float32), rng.uniform(*_GRAFT_HU), body.frame.h)
    return float(length)


def _add_skin_leads(hu: Array, body: Clinic, rng: np.random.Generator) -> None:
    """Electrodes on the skin in front, with their wires: what of the skin the field of view shows."""
    x = body.frame.model_grids()[1][1]
    place = np.argwhere((np.abs(body.skin_mm) < body.frame.h) & (x > 20))
    for _ in range(body.parameters["body"]["leads_on_skin"] if len(place) else 0):
        at = (place[rng.integers(len(place))] - body.frame.origin) * body.frame.h + [0, 3.0, 0]
        wire = at + np.cumsum(rng.normal(0, 14, (4, 3)) * [1, 0.25, 1.2], axis=0)
        line, _ = spline(np.concatenate([[at], wire + [0, 6, 0]]), np.zeros(5), 3.0)
        _paint(hu, _tube(body, line, 0.8), rng.uniform(*_SKIN_LEAD_HU), body.frame.h)


def add_disease(hu: Array, body: Clinic, look: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Paints, in place, what is in the arteries and in the chest; returns what was drawn."""
    chosen = {name: bool(rng.random() < share) for name, share in SHARES.items()}
    found: dict[str, Any] = {"plaques": _add_plaques(hu, body, look["hu"]["coronaries"], rng)}
    found["stents"] = _add_stents(hu, body, rng) if chosen["stents"] else []
    found["leads"] = _add_leads(hu, body, rng) if chosen["leads"] else 0
    found["sternal_wires"] = _add_wires(hu, body, rng) if chosen["wires"] else 0
    found["stent_graft_mm"] = _add_stent_graft(hu, body, rng) if chosen["stent_graft"] else 0.0
    _add_skin_leads(hu, body, rng)
    return found | {"motion": chosen["motion"], "steps": chosen["steps"]}


def add_motion(hu: Array, body: Clinic, drawn: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Blurs the right coronary artery and shifts the heart between slabs, in place, where `drawn` says so."""
    h, found = body.frame.h, {"rca_motion_mm": 0.0, "step_mm": []}
    if drawn["motion"]:
        index = np.rint(body.frame.to_index(body.curves_mm["RCA"])).astype(int)
        index = np.clip(index, 0, np.array(hu.shape) - 1)
        box = tuple(slice(max(a - 12, 0), b + 13) for a, b in zip(index.min(0), index.max(0), strict=True))
        artery = np.zeros(hu.shape, np.float32)
        artery[tuple(index.T)] = 1.0
        mm, heading = float(rng.uniform(1.0, 4.5)), rng.uniform(0, 2 * np.pi)
        blur_by_motion(hu[box], artery[box], motion_mm=mm, heading=heading, spacing_mm=[h] * 3)
        found["rca_motion_mm"] = mm
    if drawn["steps"]:
        found["step_mm"] = _shift_slabs(hu, body, rng)
    return found


def _shift_slabs(hu: Array, body: Clinic, rng: np.random.Generator) -> list[list[float]]:
    """Moves the heart in each slab of slices by a little of its own; what is far from it stays. Shifts in mm."""
    h, first, shifts = body.frame.h, 0, []
    near = np.minimum.reduce([d for name, d in body.pools.items() if name != "aorta"])
    weight = ndimage.gaussian_filter(np.clip(1 - near / 12, 0, 1), 4 / h)
    while first < hu.shape[2]:
        last = first + max(int(rng.uniform(*_SLAB_MM) / h), 2)
        shift = rng.normal(0, 0.6, 2).clip(-1.2, 1.2)
        part = hu[:, :, first:last]
        moved = ndimage.shift(part, (*(shift / h), 0.0), order=1, mode="nearest")
        part += weight[:, :, first:last] * (moved - part)
        shifts.append(shift.tolist())
        first = last
    return shifts
