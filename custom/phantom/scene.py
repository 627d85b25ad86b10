"""Geometry of one subject of the "clinic" style: its label map, and the tissues to paint from the back to the front."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from custom.phantom.abdomen import add_abdomen, diaphragm, draw_abdomen
from custom.phantom.branches import lung_airways, lung_vessels
from custom.phantom.chest import add_bones, add_chest_wall, draw_body, torso
from custom.phantom.clinic import MORE, courses_of, draw_field, draw_heart, width_factor
from custom.phantom.coronaries import RIGHT_TREE, coronary_curves, draw_coronaries
from custom.phantom.geometry import FAR, Array, Frame, Pose, carve, curve_length, draw_tube, spline
from custom.phantom.heart import heart_distances
from custom.phantom.labels import INTENDED_BETTI, Betti, label_map
from custom.phantom.layers import Layers
from custom.phantom.mediastinum import Drawn, add_inside, add_mediastinum, add_pleural_fluid, add_tubes
from custom.phantom.survey import Survey
from numpy.typing import NDArray

__all__ = ["Clinic", "build_clinic"]


@dataclass
class Clinic:
    """One subject's geometry.

    Attributes:
        label: (H, W, D) uint8, ids of `LABELS`.
        betti: what every label was meant to have.
        layers: to paint, from the back to the front.
        pools: signed distance (world mm) to each label but coronaries.
        frame: the grid.
        curves_mm: world centre lines by name.
        coronary_radii_mm: along the centre lines of the coronary arteries that were drawn.
        skin_mm: signed distance to the surface of the body.
        sternum_y: where the sternum lies, model mm.
        parameters: what was drawn, json-serialisable.
    """

    label: NDArray[np.uint8]
    betti: dict[int, Betti]
    layers: Layers
    pools: dict[str, Array]
    frame: Frame
    curves_mm: dict[str, NDArray[np.float64]]
    coronary_radii_mm: dict[str, NDArray[np.float64]]
    skin_mm: Array
    sternum_y: float
    parameters: dict[str, Any] = field(default_factory=dict)


def _draw_courses(
    frame: Frame, m: dict[str, Any], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, NDArray], dict[str, NDArray]]:
    """Signed distances, world centre lines and radii of all tubes that shape the heart or are airways."""
    distance, curve, radius = {}, {}, {}
    trunk = rng.normal(0, 1.2, (3, 3))
    for name, (points, radii, shares) in courses_of(m["veins"]).items():
        p = np.asarray(points, float) + rng.normal(0, 1.3, (len(points), 3)).clip(-2.6, 2.6)
        if m["veins"] == 3 and name in ("vein_ls", "vein_li"):
            p[:3] = np.asarray(points, float)[:3] + trunk
        turned = np.asarray(shares)[: len(p), None]
        world = turned * frame.to_world(p) + (1 - turned) * frame.to_world(p, rotated=False)
        line, r = spline(world, np.asarray(radii) * width_factor(name, len(radii), m) * frame.scale, 3.0)
        distance[name], curve[name], radius[name] = draw_tube(frame, line, r), line, r
    return distance, curve, radius


def _pieces(frame: Frame, line: NDArray, radius: NDArray) -> int:
    """In how many pieces the field of view cuts a tube: runs of its centre line near enough to be seen."""
    index, r = frame.to_index(line), radius[:, None] / frame.h
    seen = np.all((index + r >= 0.5) & (index - r <= np.array(frame.shape) - 1.5), axis=1).astype(int)
    return int(seen[0] + np.sum(np.diff(seen) > 0))


def build_clinic(shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator) -> Clinic:
    """Draws one subject's geometry.

    Args:
        shape: (H, W, D), the largest grid; voxels along right, anterior, superior.
        spacing_mm: isotropic voxel size.
        rng: all randomness of the geometry.

    Raises:
        TopologyError: if this draw cannot be given the intended topology; draw again.
    """
    grid_shape, scale, origin, kind = draw_field(shape, spacing_mm, rng)
    m, body, abdomen = draw_heart(rng), draw_body(rng), draw_abdomen(rng)
    x, y, z = np.deg2rad(m["heart_angles_deg"]).tolist()
    frame = Frame(grid_shape, spacing_mm, rng, Pose(scale, (x, y, z), origin))
    heart_grid, grid = frame.model_grids()
    tube, curve, radius = _draw_courses(frame, m, rng)
    betti = INTENDED_BETTI | {10: (m["veins"], 0, 0), 6: (_pieces(frame, curve["aorta"], radius["aorta"]), 0, 0)}
    d, solid = heart_distances(frame, heart_grid, m, tube, rng)
    s = np.float32(scale)
    atria = np.minimum.reduce([d["left_atrium"], d["right_atrium"], d["appendage"]]) - m["atrial_wall"] * s
    vessels = np.minimum.reduce([d["aorta"], d["pulmonary_artery"], d["pulmonary_veins"]]) - 1.5 * s
    heart = np.minimum.reduce([solid, d["right_ventricle"] - m["rv_wall"] * s, atria])
    wall = np.minimum(heart, vessels)
    size = float(np.sqrt(s) * rng.uniform(0.85, 1.1))
    survey = Survey(frame, m, d["right_ventricle"], wall, 1.9 * size + 0.6, rng)
    left_dominant = m["dominance"] == "left"
    curves = coronary_curves(survey, size, rng, left_dominant=left_dominant)
    pools = np.minimum.reduce(list(d.values()))
    coronaries, lumen, kept = draw_coronaries(
        frame, curves, d["aorta"] < 0, pools < 0, ("RCA", "AM") if left_dominant else RIGHT_TREE
    )
    label = label_map(d | {"myocardium": carve(solid, (tube["lv_outflow"], 0.0))}, coronaries, betti)
    chest = torso(grid, body, float(grid[1][wall < 0].max()))
    above = diaphragm(grid, m["cardiac_dome"], abdomen)
    drawn = Drawn(frame, m, grid, chest, above, tube, curve, d, heart, wall)
    layers = _assemble(drawn, body, abdomen, rng)
    layers.add("coronaries", lumen)
    lengths = {n: curve_length(p) for n, p, _ in curves if n in kept}
    parameters = frame.parameters | m | {"field": kind, "voxels": list(grid_shape), "body": body, "abdomen": abdomen}
    parameters |= {"coronary_size": size, "coronary_length_mm": lengths}
    lines = curve | {n: p for n, p, _ in curves if n in kept}
    radii = {n: r for n, _, r in curves if n in kept}
    return Clinic(label, betti, layers, d, frame, lines, radii, chest.skin * s, chest.sternum_y, parameters)


def _assemble(drawn: Drawn, body: dict[str, Any], abdomen: dict[str, Any], rng: np.random.Generator) -> Layers:
    """All layers but the coronary arteries, from the back to the front."""
    frame, chest, tube = drawn.frame, drawn.chest, drawn.tube
    s, layers = np.float32(frame.scale), Layers(frame.h)
    lung = np.maximum(chest.rib + 6.0, -drawn.above) * s
    more = {name: _draw_more(frame, tubes, rng) for name, tubes in MORE.items()}
    add_chest_wall(layers, chest, body, s)
    add_pleural_fluid(layers, drawn)
    layers.add("vessels", np.maximum(lung_vessels(frame, drawn.curve, lung, rng), lung + 1.0))
    bronchus_wall, bronchus_air = lung_airways(frame, drawn.curve, rng)
    layers.add("airway_wall", np.maximum(bronchus_wall, lung))
    layers.add("airway", np.maximum(bronchus_air, lung))
    add_abdomen(layers, frame, drawn.grid, drawn.above, abdomen, rng)
    add_mediastinum(layers, drawn, more, rng)
    add_bones(layers, chest, frame, body)
    add_tubes(layers, drawn, more, rng)
    layers.add("wall", drawn.wall)
    layers.add_together(drawn.pools)
    add_inside(layers, drawn, rng)
    height = drawn.grid[2]
    for name, ramp in (("svc", (height - 34) / 16), ("ivc", (-12 - height) / 16)):  # inflow mixes over 16 mm
        layers.add(name, tube[name], weight=np.clip(ramp, 0, 1))
    return layers


def _draw_more(frame: Frame, tubes: list, rng: np.random.Generator) -> Array:
    """Signed distance to the nearest of several tubes."""
    distance = np.full(frame.shape, FAR, np.float32)
    for points, radii in tubes:
        p = np.asarray(points, float) + rng.normal(0, 1.2, (len(points), 3))
        line, r = spline(frame.to_world(p, rotated=False), np.asarray(radii) * frame.scale, 4.0)
        draw_tube(frame, line, r, out=distance)
    return distance
