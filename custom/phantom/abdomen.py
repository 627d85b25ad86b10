"""What lies below the diaphragm of a clinic phantom: liver, stomach, spleen, kidneys, colon, fat. Model mm; ours."""

from __future__ import annotations

from typing import Any

import numpy as np
from custom.phantom.chest import MIDLINE
from custom.phantom.geometry import FAR, Array, Frame, draw_tube, ellipsoid, smooth_max, unit
from custom.phantom.layers import Layers, box_of
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation


def draw_abdomen(rng: np.random.Generator) -> dict[str, Any]:
    """Domes, and where the organs lie."""
    return {
        "right_dome_mm": float(rng.uniform(10, 30)),
        "left_dome_mm": float(rng.uniform(-2, 18)),
        "left_lobe_mm": float(rng.uniform(-30, 26)),  # model x of the liver's left end
        "stomach": [float(v) for v in rng.uniform([-18, -25, -92], [6, 15, -72])],
        "stomach_mm": [float(v) for v in rng.uniform([26, 32, 24], [42, 52, 38])],
        "stomach_level": float(rng.uniform(-0.9, 0.9)),
        "spleen": [float(v) for v in rng.uniform([-52, -78, -90], [-34, -55, -68])],
        "spleen_mm": [float(v) for v in rng.uniform([19, 28, 30], [28, 42, 48])],
        "colon": [float(v) for v in rng.uniform([-62, 5, -100], [-30, 40, -66])],
        "colon_mm": [float(v) for v in rng.uniform([16, 16, 16], [26, 30, 26])],
        "colon_gas": float(rng.uniform(0, 1)),
        "liver_bottom_mm": float(rng.uniform(-190, -140)),
    }


def diaphragm(grid: list[Array], heart_dome_mm: float, drawn: dict[str, Any]) -> Array:
    """Height above the diaphragm, model mm: the heart lies on its middle, a dome rises on each side."""
    x, y, z = grid
    dome = np.float32(heart_dome_mm)
    dome = dome + drawn["right_dome_mm"] * np.exp(-(((x - 112) / 45) ** 2 + ((y + 20) / 60) ** 2))
    dome = dome + drawn["left_dome_mm"] * np.exp(-(((x + 20) / 42) ** 2 + ((y + 25) / 50) ** 2))
    return z - dome + 0.0034 * (y - 10) ** 2 + 0.0009 * (x - np.float32(MIDLINE)) ** 2


def add_abdomen(
    layers: Layers, frame: Frame, grid: list[Array], above: Array, drawn: dict[str, Any], rng: np.random.Generator
) -> None:
    """Adds the organs below the diaphragm, and the vessels in the liver; `above` is the height over it."""
    s = np.float32(frame.scale)
    x, y, z = grid
    layers.add("diaphragm", above * s)
    box = box_of(above < 2, 1)
    if box is None:
        return
    inner = above[box] + 2.4
    part = [x[box], y[box], z[box]]
    layers.add("visceral_fat", inner * s, box)
    rows = Rotation.from_euler("xyz", rng.normal(0, 0.25, 3)).as_matrix()
    for gap in (-8, 112):
        kidney = ellipsoid(part, (gap, -88, -158), rows, (26, 24, 48))
        layers.add("kidney", np.maximum(kidney, inner) * s, box)
        layers.add("visceral_fat", np.maximum(kidney + 14, inner) * s, box)
    spleen = ellipsoid(part, drawn["spleen"], rows, drawn["spleen_mm"])
    layers.add("spleen", np.maximum(spleen, inner + 1.5) * s, box)
    _add_hollow(layers, part, inner, box, drawn["colon"], drawn["colon_mm"], "bowel", 1 - 2 * drawn["colon_gas"], s)
    _add_hollow(layers, part, inner, box, drawn["stomach"], drawn["stomach_mm"], "stomach", drawn["stomach_level"], s)
    edge = np.float32(drawn["left_lobe_mm"]) - 0.42 * part[1] - 0.45 * (part[2] + 45) + 0.006 * (part[1] - 10) ** 2
    edge = edge + 5 * np.sin(part[1] / 19 + 2.1 * np.sin(part[2] / 27))
    lower = np.float32(drawn["liver_bottom_mm"]) + 0.5 * np.abs(part[0] - 120) - part[2]
    liver = np.maximum(smooth_max(inner + 0.8, 0.85 * (edge - part[0]), 16.0), lower)
    layers.add("liver", liver * s, box)
    for name, tubes in (("hepatic_veins", _hepatic_veins(rng)), ("portal_veins", _portal_veins(rng))):
        _add_tubes(layers, frame, name, tubes, liver * s, box)
    crus = np.hypot((part[0] - 40) / 1.6, part[1] + 74) - 13 - 0.02 * (part[2] + 40)
    layers.add("diaphragm", np.maximum(crus, inner) * s, box)


def _add_hollow(
    layers: Layers,
    grid: list[Array],
    inner: Array,
    box: Any,
    centre: list[float],
    radii: list[float],
    content: str,
    level: float,
    s: np.float32,
) -> None:
    """An organ with a wall, and gas over its content: the patient lies on the back, gas rises to the front."""
    folds = 1.6 * np.sin(grid[0] / 3.1) * np.sin(grid[1] / 3.7) * np.sin(grid[2] / 3.4)
    surface = np.maximum(ellipsoid(grid, centre, np.eye(3), radii), inner + 1.5)
    layers.add("gut_wall", surface * s, box)
    layers.add(content, (surface + 3.5 + folds) * s, box)
    gas = np.float32(centre[1] + level * radii[1]) - grid[1]
    layers.add("gas", np.maximum(surface + 3.5 + folds, gas) * s, box)


def _hepatic_veins(rng: np.random.Generator) -> list[tuple[NDArray, NDArray]]:
    """Three veins that open into the vena cava below the dome, each with branches."""
    out = []
    for end in ([128, -48, -60], [100, 18, -72], [34, 10, -66]):
        out += _branching(np.array([70.0, -26.0, -42.0]), np.array(end) + rng.normal(0, 8, 3), 4.8, rng)
    return out


def _portal_veins(rng: np.random.Generator) -> list[tuple[NDArray, NDArray]]:
    """Branches that lead up and outwards from the gate of the liver."""
    out = []
    for end in ([130, -20, -100], [118, -40, -125], [95, 30, -112], [40, 25, -88]):
        out += _branching(np.array([72.0, -6.0, -105.0]), np.array(end) + rng.normal(0, 8, 3), 5.0, rng)
    return out


def _branching(start: NDArray, end: NDArray, radius: float, rng: np.random.Generator) -> list[tuple[NDArray, NDArray]]:
    """A bent tube and six branches of it, each with two of its own."""
    middle = 0.5 * (start + end) + rng.normal(0, 5, 3)
    line = np.array([(1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t * t * end for t in np.linspace(0, 1, 9)])
    out = [(line, np.linspace(radius, 0.35 * radius, 9))]
    for n in (2, 3, 4, 5, 6, 8):
        for share, reach in ((0.5, 26.0), (0.32, 16.0)):
            heading = unit(unit(end - start) + rng.normal(0, 0.8, 3))
            tip = line[n] + heading * reach * rng.uniform(0.7, 1.3)
            out.append((np.stack([line[n], tip]), np.array([share, 0.6 * share]) * radius))
    return out


def _add_tubes(layers: Layers, frame: Frame, name: str, tubes: list, within: Array, box: Any) -> None:
    """Tubes given in model mm, inside the organ whose signed distance is `within`."""
    distance = np.full(frame.shape, FAR, np.float32)
    for points, radii in tubes:
        world = frame.to_world(points, rotated=False)
        draw_tube(frame, world, radii * frame.scale, out=distance, reach=2.0 + frame.h)
    layers.add(name, np.maximum(distance[box], within + 1.5), box)
