"""Vessels and airways in the lungs of a clinic phantom."""

from __future__ import annotations

import numpy as np
from custom.phantom.geometry import FAR, Array, Frame, draw_tube, unit
from numpy.typing import NDArray

# Ours, by eye: millilitres of lung for each small vessel that is drawn apart from the trees, and the range of radii.
_ML_PER_VESSEL, _SMALL_MM = 1.9, (0.45, 1.9)
_HILA = ([96.0, -48.0, 45.0], [-2.0, -52.0, 48.0])


def _grow(
    frame: Frame,
    starts: list[tuple[NDArray, NDArray, float, float]],
    generations: int,
    turn: float,
    rng: np.random.Generator,
) -> list[tuple[NDArray, NDArray]]:
    """Tubes (points, radii) of trees, from (start, heading, radius, length) in world mm."""
    out, stack = [], [(*start, 0) for start in starts]
    while stack:
        p, v, r, length, depth = stack.pop()
        end = p + length * unit(v + rng.normal(0, 0.12, 3))
        out.append((np.stack([p, end]), np.array([r, 0.86 * r])))
        if depth + 1 < generations and r > 0.55:
            for ratio in (0.84, rng.uniform(0.55, 0.75)):
                turned = unit(v + rng.normal(0, turn / (0.4 + ratio), 3))
                stack.append((end, turned, ratio * r, length * rng.uniform(0.75, 0.95), depth + 1))
    return out


def _draw(frame: Frame, tubes: list[tuple[NDArray, NDArray]], grow_mm: float = 0.0) -> Array:
    out = np.full(frame.shape, FAR, np.float32)
    for points, radii in tubes:
        draw_tube(frame, points, radii + grow_mm, out=out, reach=frame.h)
    return out


def lung_vessels(frame: Frame, curve: dict[str, NDArray], lung: Array, rng: np.random.Generator) -> Array:
    """Signed distance (world mm) to trees from the ends of pulmonary arteries and veins, and to small vessels.

    Args:
        frame: the grid.
        curve: world centre lines; those of pulmonary veins and arteries are gone on from.
        lung: (H, W, D) signed distance to the lungs, world mm.
        rng: all randomness.
    """
    s, starts = frame.scale, []
    for name in (n for n in curve if n.startswith("vein_") or n in ("pulmonary_artery", "right_pulmonary_artery")):
        start, heading = curve[name][-1], unit(curve[name][-1] - curve[name][-3])
        wide = 3.4 if name.startswith("vein_") else 4.6
        starts += [
            (start, unit(heading + rng.normal(0, 0.6, 3)), wide * s, 20.0 * s) for _ in range(2 if wide < 4 else 3)
        ]
    for at, outwards in zip(_HILA, ([0.6, 0.0, 0.0], [-0.6, 0.0, 0.0]), strict=True):
        for v in rng.normal(size=(9, 3)) * [0.5, 0.8, 1.2] + outwards:
            start = frame.to_world(np.asarray(at) + 6 * unit(v), rotated=False)[0]
            starts.append((start, unit(v), rng.uniform(2.0, 3.6) * s, 20.0 * s))
    return np.minimum(_draw(frame, _grow(frame, starts, 5, 0.4, rng)), _small_vessels(frame, lung, rng))


def _small_vessels(frame: Frame, lung: Array, rng: np.random.Generator) -> Array:
    """Short tubes anywhere in the lungs that lead away from the hilum, thinner towards the pleura."""
    inside = np.flatnonzero(lung < -2.0)
    count = int(len(inside) * frame.h**3 / 1000 / _ML_PER_VESSEL)
    if count == 0:
        return np.full(frame.shape, FAR, np.float32)
    chosen = rng.choice(inside, count)
    index = np.stack(np.unravel_index(chosen, frame.shape), axis=1)
    centre = (index - frame.origin) * frame.h
    hila = frame.to_world(np.asarray(_HILA), rotated=False)
    nearest = hila[np.argmin(np.linalg.norm(centre[:, None] - hila[None], axis=2), axis=1)]
    heading = centre - nearest
    distance = np.linalg.norm(heading, axis=1, keepdims=True)
    heading = heading / np.maximum(distance, 1.0) + rng.normal(0, 0.45, (count, 3))
    half = 0.5 * rng.uniform(6, 20, (count, 1)) * heading / np.linalg.norm(heading, axis=1, keepdims=True)
    low, high = _SMALL_MM
    depth = np.clip(-lung.ravel()[chosen] / 25.0, 0, 1)
    radius = (low + (high - low) * depth * rng.random(count) ** 1.5) * frame.scale
    tubes = [(np.stack([c - v, c + v]), np.array([r, 0.8 * r])) for c, v, r in zip(centre, half, radius, strict=True)]
    return _draw(frame, tubes)


def lung_airways(frame: Frame, curve: dict[str, NDArray], rng: np.random.Generator) -> tuple[Array, Array]:
    """Signed distances (world mm) to the bronchi beyond the main ones: with their walls, and to the air in them."""
    s, starts = frame.scale, []
    for name in ("trachea_left", "bronchus"):
        start, heading = curve[name][-1], unit(curve[name][-1] - curve[name][-3])
        starts += [(start, unit(heading + rng.normal(0, 0.45, 3)), 2.7 * s, 17.0 * s) for _ in range(3)]
        middle = curve[name][len(curve[name]) // 2]
        up = unit(heading * [1, 0.3, 0] + [0, rng.normal(0, 0.3), 0.8])
        starts.append((middle, up, 3.0 * s, 22.0 * s))
    tubes = _grow(frame, starts, 4, 0.35, rng)
    air = _draw(frame, tubes)
    return _draw(frame, tubes, grow_mm=0.9), air
