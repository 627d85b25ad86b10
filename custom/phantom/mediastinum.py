"""What lies between the lungs of a clinic phantom, and what interrupts the blood in its heart. Ours, by eye."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from custom.phantom.chest import MIDLINE, Torso
from custom.phantom.geometry import Array, Frame, ellipsoid, smooth_min
from custom.phantom.layers import Layers, smooth_field
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Drawn", "add_inside", "add_mediastinum", "add_pleural_fluid", "add_tubes", "from_descending_aorta"]

# How far trabeculae reach into each pool, model mm.
_ROUGH_MM = {"left_ventricle": 7.0, "right_ventricle": 11.0, "appendage": 5.0, "right_atrium": 5.0}
_VALVES = (("left_atrium", "left_ventricle"), ("right_atrium", "right_ventricle"), ("aorta", "left_ventricle"))


@dataclass(frozen=True)
class Drawn:
    """What the tissues of one subject are made from; distances (H, W, D) are in world mm, negative inside.

    Attributes:
        frame: the grid.
        measures: of the heart, by name.
        grid: model coordinates of the chest.
        chest: the body around.
        above: height over the diaphragm, model mm.
        tube: distance to each tube.
        curve: its world centre line.
        pools: distance to each label but coronaries.
        heart: distance to the chambers with their walls.
        wall: the same with the walls of the great vessels.
    """

    frame: Frame
    measures: dict[str, Any]
    grid: list[Array]
    chest: Torso
    above: Array
    tube: dict[str, Array]
    curve: dict[str, NDArray[np.float64]]
    pools: dict[str, Array]
    heart: Array
    wall: Array


def add_pleural_fluid(layers: Layers, drawn: Drawn) -> None:
    """Fluid behind the lungs of a patient who lies on the back; its surface rises at the chest wall."""
    chest, s = drawn.chest, np.float32(drawn.frame.scale)
    for sign, depth in zip((-1, 1), drawn.measures["pleural_effusion_mm"], strict=True):
        if depth > 0:
            level = chest.y - (chest.spine_y - 20 + np.float32(depth)) - 14 * np.exp((chest.rib + 6) / 10)
            fluid = np.maximum(np.maximum(level, chest.rib + 6), np.maximum(-sign * chest.x, -drawn.above))
            layers.add("effusion", fluid * s)


def _airway(tube: dict[str, Array]) -> Array:
    return np.minimum.reduce([tube["trachea"], tube["trachea_left"], tube["bronchus"]])


def add_mediastinum(layers: Layers, drawn: Drawn, more: dict[str, Array], rng: np.random.Generator) -> None:
    """Fat that fills what lies between heart, vessels and airways; lymph nodes, pericardium and its fluid.

    Args:
        layers: to add to.
        drawn: the subject.
        more: distances to tubes that have no label, world mm.
        rng: all randomness.
    """
    s, m, tube, chest = np.float32(drawn.frame.scale), drawn.measures, drawn.tube, drawn.chest
    near = [drawn.wall, tube["svc"] - 2, tube["ivc"] - 2, tube["oesophagus"] - 1, _airway(tube) - 2]
    near += [more[name] - 1 for name in ("arteries", "brachiocephalic_veins", "azygos")]
    soft = np.clip(np.minimum.reduce(near), -15, 25)
    smooth = ndimage.gaussian_filter(soft, 7.0 * s / drawn.frame.h, truncate=3.0)
    x, y, z = drawn.grid
    flare = 13 * np.exp((y - np.float32(chest.sternum_y)) / 7) + 16 * np.exp((chest.spine_y + 14 - y) / 9)
    septum = (np.abs(x - np.float32(MIDLINE)) - np.float32(m["septum_mm"]) - np.minimum(flare, 14)) * s
    pad = ellipsoid(drawn.grid, (-18, 48, -34), np.eye(3), (26, 16, 22)) * s  # fat at the tip of the heart
    fat = smooth_min(smooth_min(smooth - np.float32(m["epicardial_fat"] * s), septum, 14.0), pad, 8.0)
    fat = np.maximum(np.maximum(fat, (chest.rib + 4) * s), -drawn.above * s - 2)
    layers.add("mediastinum", fat)
    for _ in range(m["nodes"]):
        centre = rng.uniform([20, -70, 20], [90, 30, 110])
        node = ellipsoid(drawn.grid, centre, np.eye(3), rng.uniform(2.5, 6.0, 3)) * s
        layers.add("node", np.maximum(node, fat + 1))
    _add_pericardium(layers, drawn, s)


def _add_pericardium(layers: Layers, drawn: Drawn, s: np.float32) -> None:
    """A thin sac at some distance from the heart, filled where there is an effusion."""
    m = drawn.measures
    sac = ndimage.gaussian_filter(np.clip(drawn.heart, -15, 28), 4.0 * s / drawn.frame.h, truncate=3.0)
    sac = np.maximum(sac - np.float32((2.0 + 0.4 * m["epicardial_fat"]) * s), (drawn.grid[2] - 72) * s)
    if m["pericardial_effusion_mm"] > 0:
        sac = sac - np.float32(m["pericardial_effusion_mm"]) * s
        layers.add("effusion", np.maximum(sac, -drawn.above * s))
    layers.add("pericardium", np.maximum(np.abs(sac) - 0.5, -drawn.above * s), weight=0.8)


def add_tubes(layers: Layers, drawn: Drawn, more: dict[str, Array], rng: np.random.Generator) -> None:
    """Vessels without a label, airways and oesophagus, with their walls; `more` as in `add_mediastinum`."""
    s, tube = np.float32(drawn.frame.scale), drawn.tube
    for name in ("arteries", "azygos", "brachiocephalic_veins"):
        layers.add("wall", more[name] - 0.8)
        layers.add(name, more[name])
    layers.add("airway_wall", _airway(tube) - 1.5 * s)
    layers.add("airway", _airway(tube))
    layers.add("oesophagus", tube["oesophagus"])
    if rng.random() < 0.5:  # air in it
        layers.add("airway", tube["oesophagus"] + np.float32(rng.uniform(3.0, 5.0)) * s)
    layers.add("coronary_sinus", more["coronary_sinus"])


def add_inside(layers: Layers, drawn: Drawn, rng: np.random.Generator) -> None:
    """What interrupts the blood and stays in its label: trabeculae, valves, thrombus of the descending aorta."""
    frame, m, d = drawn.frame, drawn.measures, drawn.pools
    strands: Array = np.clip(1.26 - 3 * np.abs(smooth_field(frame.shape, 2.1 * frame.scale / frame.h, rng)), 0, 1)
    for name, depth in _ROUGH_MM.items():
        rough: Array = strands * np.clip(1 + d[name] / np.float32(depth * frame.scale), 0, 1)
        layers.add("trabeculae", d[name], weight=np.float32(0.75 * m["trabeculation"]) * rough)
    for a, b in _VALVES:
        layers.add("valve", np.maximum(np.abs(d[a]), np.abs(d[b])) - 0.6, weight=0.5)
    if m["thrombus_share"] > 0:
        x, y, behind = from_descending_aorta(frame, drawn.curve["aorta"])
        turn, radius = rng.uniform(0, 2 * np.pi), 10.5 * m["descending_factor"] * frame.scale
        lumen = np.cos(turn) * x + np.sin(turn) * y - (1 - 2 * m["thrombus_share"]) * radius
        layers.add("thrombus", np.maximum(np.maximum(d["aorta"] + 0.8, behind), -lumen).astype(np.float32))


def from_descending_aorta(frame: Frame, line: NDArray[np.float64]) -> tuple[Array, Array, Array]:
    """World mm to the right and in front of the axis of the descending aorta, and distance to the room it lies in.

    Args:
        frame: the grid.
        line: (N, 3) world centre line of the aorta, from the valve on.

    Returns:
        (H, 1, D), (1, W, D) and (H, W, D).
    """
    top = int(np.argmax(line[:, 2]))
    down = line[top:][::-1]
    z = frame.axes[2]
    x = (frame.axes[0][:, None] - np.interp(z, down[:, 2], down[:, 0]))[:, None].astype(np.float32)
    y = (frame.axes[1][:, None] - np.interp(z, down[:, 2], down[:, 1]))[None].astype(np.float32)
    reach = np.maximum(np.abs(x), np.abs(y)) - np.float32(26 * frame.scale)
    return x, y, np.maximum(reach, z - np.float32(line[top, 2] - 14 * frame.scale))
