"""What a subject of the "clinic" style is drawn from: a whole chest, a varied heart, a varied field of view.

The plain phantom (`custom.phantom.anatomy`) scales a heart into the volume. Here hearts have their own size, and the
field of view is laid around them: a tight box in which the aortic arch is cut off, or a whole section of the chest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from custom.phantom.geometry import MODEL_CENTRE
from custom.phantom.heart import TUBES, draw_measures

__all__ = ["MORE", "Course", "courses_of", "draw_field", "draw_heart", "width_factor"]

# Ours, of the drawn heart, model mm: what the field of view must hold, from the bottom of the right ventricle to the
# bifurcation of the pulmonary artery and back to the descending aorta; and how far the drawn chest reaches.
CORE_MM = np.array([[-50.0, -88.0, -48.0], [98.0, 70.0, 85.0]])
DRAWN_Z = (-185.0, 190.0)
BODY_CENTRE = np.array([50.0, -35.0, 20.0])
FIELDS = {"heart": (1.02, 0.0, 0.15), "between": (1.12, 0.0, 1.0), "chest": (1.3, 0.8, 1.0)}
"""Least size over that of the core, and share of the way from there to the largest grid. Ours."""

Course = tuple[Sequence[Sequence[float]], Sequence[float], Sequence[float]]
"""Points in model mm, radii, and for the first and the last point how far it follows the heart's rotation (0 to 1)."""

COURSES: dict[str, Course] = {
    "aorta": (
        [*TUBES["aorta"][0][:-1], [36, -74, -80], [44, -72, -125], [48, -68, -200]],
        [*TUBES["aorta"][1][:-1], 10.0, 9.5, 9.0],
        (1.0, 1.0, 1.0, 0.7, 0.3, *[0.0] * 10),
    ),
    "pulmonary_artery": (*TUBES["pulmonary_artery"], (1.0, 1.0, 0.8, 0.6, 0.4, 0.3)),
    "right_pulmonary_artery": (*TUBES["right_pulmonary_artery"], (0.8, 0.7, 0.6, 0.4, 0.3)),
    "svc": ([*TUBES["svc"][0][:3], [74, -4, 104]], TUBES["svc"][1], (1.0, 0.7, 0.3, 0.0)),
    "ivc": (
        [[68, -14, -12], [70, -22, -32], [70, -28, -75], [66, -40, -120], [62, -50, -200]],
        [12.0, 12.0, 12.5, 12.0, 11.0],
        (1.0, 0.6, 0.0, 0.0, 0.0),
    ),
    "trachea": ([[50, -40, 205], [50, -44, 130], [50, -46, 88]], [8.5, 8.0, 8.0], (0.0,) * 3),
    "trachea_left": (
        [[50, -46, 90], [42, -52, 82], [20, -62, 62], [0, -70, 44], [-10, -76, 28]],
        [7.5, 6.5, 6.0, 5.0, 3.6],
        (0.0,) * 5,
    ),
    "bronchus": ([*TUBES["bronchus"][0], [104, -66, 28]], [*TUBES["bronchus"][1], 3.0], (0.0,) * 5),
    "oesophagus": ([[44, -60, 205], *TUBES["oesophagus"][0][1:]], TUBES["oesophagus"][1], (0.0,) * 5),
}
"""Courses that differ from those of `TUBES`, or that follow the heart in part."""

MORE: dict[str, list[tuple[Sequence[Sequence[float]], Sequence[float]]]] = {
    "arteries": [
        ([[45, -10, 92], [57, -18, 116], [68, -22, 134], [92, -24, 150], [130, -22, 152]], [7.5, 6.5, 6.0, 4.5, 4.0]),
        ([[66, -22, 134], [68, -26, 158], [66, -28, 205]], [4.5, 3.8, 3.6]),
        ([[38, -24, 96], [34, -28, 125], [34, -30, 205]], [4.5, 4.0, 3.6]),
        ([[29, -42, 96], [20, -44, 125], [6, -38, 148], [-34, -28, 152]], [6.0, 5.5, 5.0, 4.2]),
        ([[42, -70, -108], [42, -52, -112], [62, -40, -110], [92, -24, -108]], [4.0, 3.5, 3.0, 2.4]),
        ([[42, -54, -112], [14, -58, -104], [-22, -66, -94]], [3.2, 2.8, 2.2]),
        ([[44, -70, -122], [44, -48, -134], [44, -38, -165]], [4.0, 3.6, 3.2]),
    ],
    "brachiocephalic_veins": [
        ([[-34, -12, 146], [-4, -2, 136], [28, 8, 122], [58, 6, 112], [74, -4, 102]], [6.0, 6.5, 7.0, 7.5, 8.0]),
        ([[74, -4, 100], [84, -10, 128], [104, -14, 146], [140, -8, 150]], [9.0, 8.0, 7.0, 6.5]),
    ],
    "azygos": [
        ([[62, -80, -160], [64, -83, 20], [64, -80, 66], [70, -66, 84], [76, -38, 88], [77, -12, 84]], [3.6] * 6)
    ],
    "coronary_sinus": [
        ([[2, -34, 16], [12, -44, 2], [34, -40, -8], [54, -24, -10], [62, -12, -6]], [2.6, 3.6, 4.6, 5.2, 5.4])
    ],
}
"""Tubes that are painted but not labelled, in world directions."""


def draw_heart(rng: np.random.Generator) -> dict[str, Any]:
    """Measures of a heart that may be dilated, thick, turned; and what is varied of its vessels."""
    m = draw_measures(rng)
    kind = str(rng.choice(["normal", "dilated", "thick", "large_atria", "right"], p=[0.4, 0.15, 0.15, 0.15, 0.15]))
    left, wall, atria, right = {
        "normal": (rng.uniform(0.85, 1.05), rng.uniform(0.8, 1.15), rng.uniform(0.85, 1.1), rng.uniform(0.93, 1.03)),
        "dilated": (rng.uniform(1.1, 1.28), rng.uniform(0.75, 1.0), rng.uniform(1.0, 1.2), rng.uniform(1.0, 1.08)),
        "thick": (rng.uniform(0.78, 0.95), rng.uniform(1.25, 1.7), rng.uniform(1.0, 1.15), rng.uniform(0.93, 1.0)),
        "large_atria": (
            rng.uniform(0.9, 1.05),
            rng.uniform(0.9, 1.1),
            rng.uniform(1.12, 1.32),
            rng.uniform(0.97, 1.05),
        ),
        "right": (rng.uniform(0.85, 1.0), rng.uniform(0.9, 1.1), rng.uniform(0.95, 1.1), rng.uniform(1.05, 1.15)),
    }[kind]
    axis = np.asarray(m["axis"]) + rng.normal(0, 0.05, 3)
    return m | {
        "heart_kind": kind,
        "axis": (axis / np.linalg.norm(axis)).tolist(),
        "lv_radius": m["lv_radius"] * left,
        "lv_length": m["lv_length"] * (0.5 + 0.5 * left),
        "wall": m["wall"] * wall,
        "la_radii": [r * atria * f for r, f in zip(m["la_radii"], rng.uniform(0.95, 1.05, 3), strict=True)],
        "ra_radii": [r * (1.12 if kind == "right" else 0.5 + 0.5 * atria) for r in m["ra_radii"]],
        "rv_radii": [r * right for r in m["rv_radii"]],
        "ascending_factor": float(rng.choice([1.0, 1.25], p=[0.85, 0.15]) * rng.uniform(0.88, 1.1)),
        "descending_factor": float(rng.choice([1.0, 1.4], p=[0.88, 0.12]) * rng.uniform(0.9, 1.15)),
        "pulmonary_factor": float(rng.choice([1.0, 1.25], p=[0.8, 0.2]) * rng.uniform(0.9, 1.1)),
        "vessel_factor": float(rng.uniform(0.85, 1.2)),
        "epicardial_fat": float(rng.uniform(1.5, 9.0)),
        "heart_angles_deg": rng.normal(0, 5, 3).clip(-11, 11).tolist(),
        "dominance": "left" if rng.random() < 0.15 else "right",
        "veins": int(rng.choice([3, 4, 5], p=[0.15, 0.6, 0.25])),
        "trabeculation": float(rng.uniform(0.0, 1.0)),
        "pericardial_effusion_mm": float(rng.uniform(3, 14) if rng.random() < 0.12 else 0.0),
        "pleural_effusion_mm": [float(rng.uniform(10, 60) if rng.random() < 0.12 else 0.0) for _ in range(2)],
        "thrombus_share": float(rng.uniform(0.3, 0.8) if rng.random() < 0.1 else 0.0),
        "septum_mm": float(rng.uniform(1.0, 7.0)),
        "nodes": int(rng.integers(0, 9)),
    }


def draw_field(
    shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator
) -> tuple[tuple[int, int, int], float, tuple[float, float, float], str]:
    """Draws a field of view that holds the heart of one subject, and the size of that heart.

    Returns:
        Its grid, at most `shape`; world mm of a model mm, at most what fits; index of the world's origin; one of the
        words heart, between and chest.
    """
    full = np.array(shape) * spacing_mm
    core = (CORE_MM - MODEL_CENTRE) * 1.03
    size = core[1] - core[0]
    scale = float(min(np.clip(rng.normal(1.0, 0.07), 0.86, 1.14), (full / size).min()))
    kind = str(rng.choice(list(FIELDS), p=[0.2, 0.4, 0.4]))
    margin, low, high = FIELDS[kind]
    least = np.minimum(scale * size * margin, full)
    share = rng.uniform(low, high, 2)[[0, 0, 1]]  # square in plane
    grid = np.minimum(np.ceil((least + (full - least) * share) / spacing_mm).astype(int), shape)
    extent = grid * spacing_mm
    first, last = scale * core[1] - extent, scale * core[0]  # of its lowest corner
    bottom, top = scale * (np.array(DRAWN_Z) - MODEL_CENTRE[2])
    first[2] = min(max(first[2], bottom), last[2])
    last[2] = max(min(last[2], top - extent[2]), first[2])
    middle = scale * (BODY_CENTRE - MODEL_CENTRE) - extent / 2 + rng.normal(0, 12, 3)
    corner = np.clip(middle, first, last)
    corner[2] = rng.uniform(first[2], last[2])
    origin = -corner / spacing_mm - 0.5
    return (int(grid[0]), int(grid[1]), int(grid[2])), scale, (origin[0], origin[1], origin[2]), kind


def courses_of(veins: int) -> dict[str, Course]:
    """Courses of all tubes that shape a heart with that many pulmonary veins, and of its airways and oesophagus."""
    courses = {n: (*tube, (1.0,) * len(tube[0])) for n, tube in TUBES.items() if not n.startswith("vein_")}
    return courses | COURSES | _vein_courses(veins)


def _vein_courses(count: int) -> dict[str, Course]:
    """Pulmonary veins: four, or a common trunk on the left, or an own vein of the right middle lobe."""
    shares = (1.0, 0.8, 0.5, 0.3)
    veins: dict[str, Course] = {n: (*TUBES[n], shares) for n in ("vein_rs", "vein_ri", "vein_ls", "vein_li")}
    if count == 3:
        trunk, radii, follow = [[28, -44, 33], [12, -53, 37], [2, -56, 39]], [9.5, 9.0, 7.0, 5.0, 4.0], (*shares, 0.3)
        veins["vein_ls"] = ([*trunk, [-10, -57, 52], [-24, -53, 62]], radii, follow)
        veins["vein_li"] = ([*trunk, [-10, -66, 22], [-24, -74, 6]], radii, follow)
    if count == 5:
        veins["vein_rm"] = ([[64, -34, 30], [82, -30, 29], [98, -22, 24], [108, -14, 16]], [5.0, 4.2, 3.6, 3.0], shares)
    return veins


def width_factor(name: str, points: int, m: dict[str, Any]) -> Any:
    """By what the radii of a course are multiplied."""
    if name == "aorta":
        ascending, descending = m["ascending_factor"], m["descending_factor"]
        return np.r_[1.0, ascending, np.full(3, ascending), 1.0, np.full(points - 6, descending)] * m["aorta_factor"]
    if name in ("pulmonary_artery", "right_pulmonary_artery"):
        return m["pulmonary_factor"]
    return m["vessel_factor"] if name.startswith("vein_") or name in ("svc", "ivc") else 1.0
