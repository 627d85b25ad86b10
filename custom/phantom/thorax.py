"""What surrounds the heart of the cardiac CT phantom: chest wall, lungs, abdomen, bones, lung vessels."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.geometry import FAR, Array, Frame, draw_tube, ellipsoid, unit
from numpy.typing import NDArray


def _abdomen(
    grid: list[Array], shape: dict[str, Any], s: np.float32, rng: np.random.Generator
) -> tuple[Array, list[tuple[str, Array]]]:
    """Distance to all below the diaphragm, and its layers."""
    x, y, z = grid
    dome = shape["cardiac_dome"] + 22 * np.exp(-(((x - 112) / 45) ** 2 + ((y + 25) / 55) ** 2))
    dome += 8 * np.exp(-(((x + 60) / 40) ** 2 + ((y + 30) / 50) ** 2)) - 0.0022 * (y - 10) ** 2
    below = (z - dome) * s
    gas = ellipsoid(grid, (-30 + rng.normal(0, 5), 15, -66), np.eye(3), (22, 24, 10)) * s
    return below, [
        ("diaphragm", below),
        ("liver", np.maximum(below + 2, -(x - 2) * s)),
        ("viscera", np.maximum(below + 3, (x + 5) * s)),
        ("gas", np.maximum(gas, below + 5)),
    ]


def _bones(grid: list[Array], hull: Array, s: np.float32, rng: np.random.Generator) -> list[tuple[str, Array]]:
    """Layers of spine, ribs and sternum, each cortex before its marrow."""
    x, y, z = grid
    spine = np.array([58.0, -97.0, 0.0]) + rng.normal(0, 2, 3)
    rib = np.abs((z + 0.55 * y + 0.1 * np.abs(x - 52) + rng.uniform(0, 27)) % 27 - 13.5) * s
    ribs = (np.hypot((hull + 3) / 3.2, np.where(np.abs(x - 52) > 20, rib / 5.5, 9)) - 1) * 3.2
    sternum = ((((x - 52) / 17) ** 4 + ((y - 63) / 5.5) ** 4) ** 0.25 - 1) * 5.5 * s
    body = (np.sqrt((x - spine[0]) ** 2 + 1.25 * (y - spine[1]) ** 2) - 19 + 1.5 * np.cos(2 * np.pi * z / 28)) * s
    level = np.abs(z % 28 - 14) - 11.5
    return [
        ("spine_muscle", body - 5 * s),
        ("cortex", np.maximum(body, level * s)),
        ("marrow", np.maximum(body, level * s) + 1.8),
        ("disc", np.maximum(body, -level * s)),
        ("cortex", ribs),
        ("marrow", ribs + 1.6),
        ("cortex", sternum),
        ("marrow", sternum + 1.8),
    ]


def thorax_layers(
    frame: Frame, grid: list[Array], shape: dict[str, Any], rng: np.random.Generator
) -> list[tuple[str, Array]]:
    """Layers behind the heart: fat, muscle, lung, abdomen, bones (signed distances, world mm).

    "vessels" and "mediastinum" only hold a place: the caller, who knows the heart, puts its own there.
    """
    s = np.float32(frame.scale)
    x, y, _ = grid
    hull = (np.sqrt(((x - 52) / 132) ** 2 + ((y + 16) / 84) ** 2) - 1) * 84 * s
    bones = _bones(grid, hull, s, rng)
    below, abdomen = _abdomen(grid, shape, s, rng)
    chest_wall = [("fat", hull - 26), ("muscle", hull - rng.uniform(7, 12)), ("lung", hull + 7)]
    return [*chest_wall, ("vessels", below), *abdomen, ("mediastinum", below), *bones]


def lung_vessels(frame: Frame, curve: dict[str, NDArray], rng: np.random.Generator) -> Array:
    """Random branching trees in the lungs: from the ends of pulmonary veins and arteries, and all around each hilum."""
    out, s = np.full(frame.shape, FAR, np.float32), frame.scale
    stack = []
    for name in ("vein_rs", "vein_ri", "vein_ls", "vein_li", "pulmonary_artery", "right_pulmonary_artery"):
        start, heading = curve[name][-1], unit(curve[name][-1] - curve[name][-3])
        stack += [(start, unit(heading + rng.normal(0, 0.6, 3)), 3.0 * s, 18.0 * s, 0) for _ in range(2)]
    for hilum, outwards, count in (([98, -50, 45], [0.6, 0, 0], 8), ([-4, -52, 45], [-0.5, 0.1, 0], 22)):
        for v in rng.normal(size=(count, 3)) * [0.7, 0.8, 1.2] + outwards:
            v = unit(v)
            start = frame.to_world(np.asarray(hilum) + rng.uniform(4, 40) * v, rotated=False)[0]
            stack.append((start, v, rng.uniform(1.8, 3.0) * s, 17.0 * s, 1))
    while stack:
        p, v, r, length, depth = stack.pop()
        end = p + length * unit(v + rng.normal(0, 0.15, 3))
        draw_tube(frame, np.stack([p, end]), np.array([r, 0.85 * r]), out=out, reach=2.0)
        if depth < 5:
            for ratio in (0.84, rng.uniform(0.55, 0.75)):
                turned = unit(v + rng.normal(0, 0.45 / (0.4 + ratio), 3))
                stack.append((end, turned, ratio * r, length * rng.uniform(0.7, 0.95), depth + 1))
    return out
