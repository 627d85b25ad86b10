"""Chest wall, lungs, bones and what a patient lies on, around the heart of a clinic phantom.

Positions are in model mm (RAS, origin in the left ventricle), from the midline of the body. Measures are ours, drawn by
hand after anatomy texts and by eye.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from custom.phantom.geometry import FAR, Array, Frame, draw_tube
from custom.phantom.layers import Layers, box_of

MIDLINE = 50.0
RIB_GAP_MM, DISC_GAP_MM = 27.0, 26.0
SPINE_Y = -97.0
APEX_Z, WIDEST_Z = 195.0, 10.0  # of the lungs, and where the cage is widest
_WALL_MM = 6.0  # from the middle of the ribs to the pleura, and to the muscles around


def draw_body(rng: np.random.Generator) -> dict[str, Any]:
    """Habitus of one subject, model mm: cage, muscle, fat, breast, arms, couch."""
    woman = bool(rng.random() < 0.45)
    return {
        "woman": woman,
        "cage_mm": [float(rng.uniform(116, 142)), float(rng.uniform(82, 102))],
        "squareness_mm": float(rng.uniform(2.0, 8.0)),
        "muscle": float(rng.uniform(0.6, 1.1) if woman else rng.uniform(0.7, 1.6)),
        "fat_mm": float(np.exp(rng.uniform(np.log(4), np.log(38)))),
        "breast_mm": float(rng.uniform(15, 55) if woman else rng.uniform(0, 9)),
        "gland": float(rng.uniform(0.0, 1.0)),
        "kyphosis": float(rng.uniform(0.0002, 0.0012)),
        "arms_down": bool(rng.random() < 0.15),
        "couch_gap_mm": float(rng.uniform(0, 12)),
        "rib_phase_mm": float(rng.uniform(0, RIB_GAP_MM)),
        "disc_phase_mm": float(rng.uniform(0, DISC_GAP_MM)),
        "vertebra_mm": float(rng.uniform(16.5, 21.5)),
        "scoliosis_mm": float(rng.normal(0, 3)),
        "cartilage_calcified": bool(rng.random() < 0.5),
        "leads_on_skin": int(rng.integers(0, 6)),
    }


@dataclass
class Torso:
    """Coordinates of every voxel in the body, model mm.

    Attributes:
        x, y, z: to the right of the midline, anterior, superior.
        rib: signed distance to the sheet in which the ribs lie, negative inside.
        front: 1 in front, -1 behind, 0 at the sides.
        skin: signed distance to the surface of the body.
        spine_y: where the middle of the vertebrae lies.
        sternum_y: where the sternum lies, in front of the heart.
    """

    x: Array
    y: Array
    z: Array
    rib: Array
    front: Array
    skin: Array
    muscle: Array
    spine_y: Array
    sternum_y: float


def _bump(value: Array, centre: float, width: float) -> Array:
    return np.exp(-(((value - np.float32(centre)) / np.float32(width)) ** 2))


def torso(grid: list[Array], body: dict[str, Any], heart_front_mm: float) -> Torso:
    """The body around a heart that reaches to `heart_front_mm` (model y) in front."""
    x, y, z = grid[0] - np.float32(MIDLINE), grid[1], grid[2]
    half_width, half_depth = body["cage_mm"]
    front_y = max(62.0, heart_front_mm + 4.0)
    centre_y = np.float32(front_y - half_depth)
    height = np.clip((z - WIDEST_Z) / np.float32(APEX_Z - WIDEST_Z), 0, 0.985)
    narrow = np.sqrt(1 - height**2)
    a, b = np.float32(half_width) * narrow, np.float32(half_depth) * narrow**0.7
    u, v = x / a, (y - centre_y) / b
    k0 = np.sqrt(u**2 + v**2) + np.float32(1e-3)
    k1 = np.sqrt((u / a) ** 2 + (v / b) ** 2) + np.float32(1e-5)
    front = v / k0
    corner = 8 * front**4 - 8 * front**2 + 1  # cos of four times the angle
    rib = k0 * (k0 - 1) / k1 + np.float32(body["squareness_mm"]) * (corner + 1) * np.clip(k0, 0, 1) * narrow**2
    side = np.abs(x)
    pectoral = 15 * _bump(front, 0.75, 0.28) * _bump(side, 65, 38) / (1 + np.exp(-(z - 5) / 14))
    lateral = 10 * _bump(front, -0.15, 0.4)
    dorsal = 28 * np.clip(-front * 2 - 0.3, 0, 1) * np.clip(1.15 - (side / 108) ** 2, 0, 1)
    shoulder = 26 * _bump(front, -0.1, 0.9) / (1 + np.exp(-(z - 108) / 14))
    muscle = np.float32(body["muscle"]) * (3 + pectoral + lateral + 0.8 * dorsal) + 6 * np.clip(-front, 0, 1) + shoulder
    breast = body["breast_mm"] * _bump(side, 68, 40) * _bump(z, 12, 48) * np.clip(front * 2 - 0.5, 0, 1)
    fat = body["fat_mm"] * (0.75 + 0.35 * np.clip(-z / 100, 0, 1) + 0.25 * front**2)
    skin = rib - _WALL_MM - muscle - fat - breast - 2.0
    spine_y = np.float32(SPINE_Y) + np.float32(body["kyphosis"]) * (z - 30) ** 2
    return Torso(x, y, z, rib, front, skin, muscle, spine_y, front_y - 1.0)


def add_chest_wall(layers: Layers, torso: Torso, body: dict[str, Any], s: np.float32) -> None:
    """Couch, arms, skin, fat, gland, muscle and lung, from the back to the front."""
    _add_couch(layers, torso, body, s)
    if body["arms_down"]:
        _add_arms(layers, torso, body, s)
    t, wall = torso, torso.rib - np.float32(_WALL_MM)
    layers.add("skin", t.skin * s)
    layers.add("fat", (t.skin + 2.2) * s)
    if body["breast_mm"] > 10:
        lobes = np.sin(t.x / 4.1 + 1.7 * np.sin(t.z / 5.3)) * np.sin(t.z / 3.7 + 1.3 * np.sin(t.y / 4.9))
        gland = np.maximum(t.skin + 7, wall - t.muscle - 4) + 9 * np.clip(0.5 - body["gland"] - lobes, 0, 2)
        layers.add("gland", np.maximum(gland, 40 * (0.45 - t.front)) * s)
    layers.add("muscle", (wall - t.muscle) * s)
    plane = np.abs(wall - 0.45 * t.muscle - 1.2 * np.sin(t.x / 17) * np.sin(t.z / 23)) - 0.55
    layers.add("fat", np.maximum(plane, 9 - t.muscle) * s, weight=0.8)
    layers.add("fat", (t.rib + 3.6) * s)
    layers.add("muscle", np.maximum(t.rib + 3.6, -(t.rib + 6.0) + 0.8) * s, weight=0.5)
    layers.add("lung", (t.rib + _WALL_MM) * s)


def _add_couch(layers: Layers, torso: Torso, body: dict[str, Any], s: np.float32) -> None:
    """Curved plate of carbon fibre filled with foam, under the back."""
    inside = torso.skin < 0
    if not inside.any():
        return
    top = float(torso.y[inside].min()) - body["couch_gap_mm"] + np.float32(0.0009) * torso.x**2
    depth = top - torso.y
    layers.add("mattress", np.maximum(-depth, depth - 14) * s, weight=0.9)
    layers.add("foam", np.maximum(14 - depth, depth - 50) * s)
    layers.add("carbon", np.minimum(np.abs(depth - 15), np.abs(depth - 50)) * s - np.float32(1.2))


def _add_arms(layers: Layers, torso: Torso, body: dict[str, Any], s: np.float32) -> None:
    reach = body["cage_mm"][0] + body["fat_mm"] + 10 * body["muscle"] + 60
    arm = np.hypot(np.abs(torso.x) - np.float32(reach), torso.y + 35) - np.float32(34 + 0.6 * body["fat_mm"])
    for name, depth in (("skin", 0.0), ("fat", 2.0), ("muscle", 5 + 0.6 * body["fat_mm"])):
        layers.add(name, (arm + np.float32(depth)) * s)
    bone = np.hypot(np.abs(torso.x) - np.float32(reach), torso.y + 30) - np.float32(11)
    layers.add("cortex", bone * s)
    layers.add("marrow_fat", (bone + 4.5) * s)


def add_bones(layers: Layers, torso: Torso, frame: Frame, body: dict[str, Any]) -> None:
    """Ribs with their cartilage, sternum, clavicles, shoulder blades and spine."""
    t, s = torso, np.float32(frame.scale)
    side = np.abs(t.x)
    course = np.abs((t.z + 0.55 * t.y + 0.1 * side + body["rib_phase_mm"]) % RIB_GAP_MM - RIB_GAP_MM / 2)
    bar = (np.hypot(t.rib / 3.3, course / np.where(t.front > 0.7, 6.5, 5.8)) - 1) * 3.3
    bar = np.maximum(bar, 16 - side)
    low = np.float32(-70) + t.z * 0 - 0.5 * (t.y - 20)  # the costal arch: no ribs in front below it
    bar = np.maximum(bar, np.clip(low - t.z, -20, 20) * np.clip(t.front, 0, 1))
    cartilage = np.maximum(bar, np.maximum(side - 74 - 0.25 * np.clip(-t.z, 0, 99), 40 * (0.55 - t.front)))
    bone = np.maximum(bar, -cartilage)
    layers.add("cortex", bone * s)
    layers.add("marrow", np.maximum(bone + 1.5, bar + 1.5) * s)
    if body["cartilage_calcified"]:
        layers.add("calcified_rim", cartilage * s)
        layers.add("cartilage", (cartilage + 1.0) * s)
    else:
        layers.add("cartilage", cartilage * s)
    _add_sternum(layers, t, s)
    _add_shoulders(layers, t, frame, body)
    _add_spine(layers, t, body, s)


def _add_sternum(layers: Layers, t: Torso, s: np.float32) -> None:
    width = 15 + 12 / (1 + np.exp(-(t.z - 88) / 8)) - 8 / (1 + np.exp((t.z + 22) / 6))
    depth = t.y - np.float32(t.sternum_y) + 0.12 * np.clip(t.z - 20, 0, 99)
    bar = ((((t.x / width) ** 4 + (depth / 6.0) ** 4) ** 0.25) - 1) * 6.0
    bar = np.maximum(bar, np.maximum(np.maximum(t.z - 122, -34 - t.z), 1.2 - np.abs(t.z - 84)))
    layers.add("cortex", bar * s)
    layers.add("marrow", (bar + 1.5) * s)


def _add_shoulders(layers: Layers, t: Torso, frame: Frame, body: dict[str, Any]) -> None:
    """Shoulder blades on the back of the cage, and clavicles: only where the field of view reaches so high."""
    s = np.float32(frame.scale)
    if float(t.z.max()) < 40:
        return
    side = np.abs(t.x)
    plate = np.maximum(np.abs(t.rib - 17) - 2.6, np.maximum(np.abs(side - 92) - 38, np.abs(t.z - 112) - 62))
    plate = np.maximum(plate, 40 * (t.front + 0.3))
    layers.add("cortex", plate * s)
    layers.add("marrow", (plate + 1.5) * s)
    clavicle = np.full(frame.shape, FAR, np.float32)
    for sign in (-1, 1):
        points = np.array([[18, 52, 122], [60, 50, 132], [105, 25, 142], [145, -10, 150]], float)
        points[:, 0] = MIDLINE + sign * points[:, 0]
        draw_tube(frame, frame.to_world(points, rotated=False), np.full(4, 7.0) * s, out=clavicle, reach=4.0)
    layers.add("cortex", clavicle)
    layers.add("marrow", clavicle + 2.0)


def _add_spine(layers: Layers, t: Torso, body: dict[str, Any], s: np.float32) -> None:
    """Vertebrae with their arches and processes, discs, canal and cord, within the box that holds them."""
    box = box_of((np.abs(t.x) < 52) & (np.abs(t.y - t.spine_y + 25) < 62), 1)
    if box is None:
        return
    x = t.x[box] - np.float32(body["scoliosis_mm"]) * np.sin(t.z[box] / 60)
    y, z = t.y[box] - t.spine_y[box], t.z[box]
    r = np.float32(body["vertebra_mm"])
    level = (z + np.float32(body["disc_phase_mm"])) % DISC_GAP_MM - DISC_GAP_MM / 2  # 0 in the middle of a vertebra
    waist = 1.6 * np.cos(2 * np.pi * level / DISC_GAP_MM)
    body_wall = (np.sqrt((x / 1.08) ** 2 + (1.2 * y) ** 2) - r + waist) / 1.05
    ends = np.abs(level) - 10.4
    back = -r / 1.2
    canal = np.hypot(x / 1.15, y - back + 7.5) - 8.0
    tall = np.abs(level + 2) - 9.5
    arch = np.maximum(np.abs(canal - 3.0) - 2.6, tall)
    side = np.abs(x)
    along = np.clip((side - 13) / 24, 0, 1)
    transverse = np.sqrt((side - 13 - 24 * along) ** 2 + (y - back + 8 + 11 * along) ** 2 + (0.9 * (level - 2)) ** 2)
    tip = back - 16
    spinous = np.maximum(np.maximum(side - 2.9, np.abs(y - tip + 14) - 16), np.abs((level - 0.55 * (y - tip)) + 3) - 7)
    vertebra = np.maximum(body_wall, ends)
    processes = np.maximum(np.minimum.reduce([arch, transverse - 5.2, spinous]), t.skin[box] + 5)
    layers.add("muscle", (body_wall - 2.5) * s, box, weight=0.8)
    layers.add("disc", np.maximum(body_wall, -ends) * s, box)
    for bone, depth in ((processes, 2.0), (vertebra, 1.5)):
        layers.add("cortex", bone * s, box)
        layers.add("marrow", (bone + np.float32(depth)) * s, box)
    vein = np.hypot(0.5 * x, level) - 2.2  # the basivertebral vein
    layers.add("canal", np.maximum(vein, np.maximum(y + 2, back - y)) * s, box, weight=0.5)
    layers.add("canal", canal * s, box)
    layers.add("cord", (np.hypot(x / 1.25, y - back + 7.5) - 4.2) * s, box)
