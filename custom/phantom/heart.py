"""Heart chambers and great vessels of the cardiac CT phantom: measures and signed distances.

See `custom.phantom.geometry` for model and world millimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from custom.phantom.geometry import Array, Frame, carve, dot, draw_tube, ellipsoid, smooth_max, smooth_min, spline, unit
from numpy.typing import NDArray

# Centre lines and radii in model mm, jittered per subject. The courses are ours, drawn by hand; widths are near those
# of adults in CT: aorta 33 and 24 mm, ascending and descending (Wolak et al. 2008), pulmonary trunk 25 mm (Truong et
# al. 2012).
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
# Ours, drawn: centre and base plane of the left ventricle along its axis, which points to the apex; the plane between
# right atrium and right ventricle. Model mm.
LV_CENTRE_T, LV_BASE_T = -12.0, -33.0
VALVE_POINT, VALVE_NORMAL = np.array([46.0, 20.0, 0.0]), unit([-0.78, 0.58, -0.22])


def draw_measures(rng: np.random.Generator) -> dict[str, Any]:
    """Random measures of one subject, model mm."""
    return {
        "axis": unit(np.array([-0.68, 0.62, -0.38]) + rng.normal(0, 0.05, 3)).tolist(),
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


def lv_frame(axis: Any) -> tuple[NDArray, NDArray, NDArray]:
    """Orthonormal rows: towards the apex, towards the septum (right-anterior), and towards the anterior wall."""
    a = np.asarray(axis)
    septal = np.array([0.6, 0.8, 0.0])
    e1 = unit(septal - (septal @ a) * a)
    e2 = np.cross(a, e1)
    return a, e1, e2 * np.sign(e2[2])


def _jitter(rng: np.random.Generator, points: Sequence[Sequence[float]], sd_mm: float) -> NDArray[np.float64]:
    return np.asarray(points, dtype=np.float64) + rng.normal(0.0, sd_mm, (len(points), 3)).clip(-2 * sd_mm, 2 * sd_mm)


def draw_vessels(
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


def _trabeculae(frame: Frame, shape: dict[str, Any], rng: np.random.Generator) -> Array:
    """Roughness to add to the distance of a ventricle or an appendage, world mm."""
    k = rng.normal(size=(10, 3))
    k = k / np.linalg.norm(k, axis=1, keepdims=True) * (2 * np.pi / rng.uniform(8, 18, 10) / frame.scale)[:, None]
    waves = sum(frame.waves(k, rng.uniform(0, 6.28, 10)), np.zeros(frame.shape, np.float32))
    return np.float32(shape["trabeculae"] * 0.45) * waves


def _left_ventricle(
    frame: Frame, grid: list[Array], shape: dict[str, Any], tube: dict[str, Array], rough: Array
) -> tuple[dict[str, Array], Array]:
    """Cavity and muscle, carved; and the whole ventricle, solid."""
    s, ao = np.float32(frame.scale), tube["aorta"]
    rows = np.stack(lv_frame(shape["axis"]))
    centre = LV_CENTRE_T * rows[0]
    r, length, wall = shape["lv_radius"], shape["lv_length"], shape["wall"]
    base = (LV_BASE_T - dot(grid, (0, 0, 0), rows[0])) * s
    endo = ellipsoid(grid, centre, rows, (length, r, r)) * s
    for angle in (2.2, 3.9):  # papillary muscles: ridges of the free wall
        foot = np.cos(angle) * rows[1] + np.sin(angle) * rows[2]
        line = np.array([20 * rows[0] + (0.72 * r) * foot, -4 * rows[0] + (0.80 * r) * foot])
        endo = smooth_max(endo, -draw_tube(frame, frame.to_world(line), np.full(2, 4.5) * s), 3.0)
    solid = smooth_max(ellipsoid(grid, centre, rows, (length + 0.75 * wall, r + wall, r + wall)) * s, base, 9.0)
    cavity = smooth_min(smooth_max(endo + 0.7 * rough, base, 7.0), tube["lv_outflow"], 3.0)
    cavity = carve(cavity, (ao, 0.0))
    muscle = carve(solid, (cavity, 0.0), (ao, 0.0), (tube["lv_outflow"], 0.0))
    return {"left_ventricle": cavity, "myocardium": muscle}, solid


def _left_atrium(
    grid: list[Array], shape: dict[str, Any], tube: dict[str, Array], left_ventricle: Array, solid: Array, s: np.float32
) -> Array:
    la = smooth_min(ellipsoid(grid, (46, -35, 29), np.eye(3), shape["la_radii"]) * s, tube["mitral"], 5.0)
    taken = [(tube["aorta"], 1.8), (solid, 0.0), (left_ventricle, 0.0)]
    return carve(la, *taken, (tube["lv_outflow"], 1.0), (tube["oesophagus"], 1.5))


def _right_heart(
    grid: list[Array],
    shape: dict[str, Any],
    tube: dict[str, Array],
    left: dict[str, Array],
    solid: Array,
    rough: Array,
    s: np.float32,
) -> dict[str, Array]:
    """Right atrium, right ventricle and pulmonary artery beside the `left` heart, parted by their two valves."""
    ao, la = tube["aorta"], left["left_atrium"]
    side = dot(grid, VALVE_POINT, VALVE_NORMAL) * s
    others = [(ao, 2.0), (la, 2.5), (tube["lv_outflow"], 2.5), (left["left_ventricle"], 2.5)]
    ra = smooth_min(ellipsoid(grid, (67, 5, 8), np.eye(3), shape["ra_radii"]) * s, tube["svc"], 5.0)
    ra = np.maximum(ra, dot(grid, (0, 0, 46), (0, 0, 1)) * s)
    ra = carve(np.maximum(ra + 0.6 * rough, side), *others, (solid, 1.0))
    body = ellipsoid(grid, (15, 27, -7), np.stack(lv_frame(shape["axis"])), shape["rv_radii"]) * s
    body = np.maximum(smooth_min(body, tube["inlet"], 6.0), -side)
    pulmonary_valve = dot(grid, (27, 22, 46), (-0.1, -0.35, 0.93)) * s
    rv = np.maximum(smooth_min(body, tube["outflow"], 8.0), pulmonary_valve)
    rv = carve(rv + rough, (solid, 0.0), *others, (ra, 0.0))
    pa = np.maximum(smooth_min(tube["pulmonary_artery"], tube["right_pulmonary_artery"], 3.0), -pulmonary_valve)
    pa = carve(pa, (ao, 2.2), (la, 2.2), (rv, 0.0), (tube["svc"], 2.0))
    return {"right_atrium": ra, "right_ventricle": rv, "pulmonary_artery": pa}


def _appendage_and_veins(tube: dict[str, Array], d: dict[str, Array], solid: Array, rough: Array) -> dict[str, Array]:
    """What opens into the left atrium, in the room that the other structures `d` leave."""
    ao, la, pa = d["aorta"], d["left_atrium"], d["pulmonary_artery"]
    room = [(pa, 2.5), (ao, 8.0), (tube["circumflex_room"], 3.5)]
    laa = np.minimum(tube["appendage"] + rough, tube["appendage"] + 2.5)
    laa = carve(laa, *room, (la, 0.0), (solid, 5.5), (d["right_ventricle"], 3.0))
    veins = np.minimum.reduce([distance for name, distance in tube.items() if name.startswith("vein_")])
    gaps = [(pa, 2.2), (ao, 2.2), (la, 0.0), (laa, 2.2), (solid, 2.0), (tube["svc"], 2.0), (d["right_atrium"], 2.0)]
    return {"appendage": laa, "pulmonary_veins": carve(veins, *gaps)}


def heart_distances(
    frame: Frame, grid: list[Array], shape: dict[str, Any], tube: dict[str, Array], rng: np.random.Generator
) -> tuple[dict[str, Array], Array]:
    """Signed distances (world mm) of all labels but coronaries, mutually exclusive; and of the whole left ventricle."""
    s = np.float32(frame.scale)
    rough = _trabeculae(frame, shape, rng)
    left, solid = _left_ventricle(frame, grid, shape, tube, rough)
    d = {"aorta": tube["aorta"], **left}
    d["left_atrium"] = _left_atrium(grid, shape, tube, d["left_ventricle"], solid, s)
    d |= _right_heart(grid, shape, tube, d, solid, rough, s)
    d |= _appendage_and_veins(tube, d, solid, rough)
    return d, solid
