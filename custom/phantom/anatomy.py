"""Geometry of one subject of the cardiac CT phantom: its label map and the tissue layers to paint.

Coronary arteries are routed over what the heart (`custom.phantom.heart`) leaves free.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from custom.phantom.coronaries import coronary_curves, draw_coronaries
from custom.phantom.geometry import Array, Frame, carve, coverage, curve_length, smooth_min
from custom.phantom.heart import draw_measures, draw_vessels, heart_distances
from custom.phantom.labels import INTENDED_BETTI, LABELS, TopologyError, label_map
from custom.phantom.survey import Survey
from custom.phantom.thorax import lung_vessels, thorax_layers
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["INTENDED_BETTI", "LABELS", "Geometry", "TopologyError", "build_geometry"]


@dataclass
class Geometry:
    """One subject's geometry on a grid.

    Attributes:
        label: (H, W, D) uint8, ids of `LABELS`.
        layers: painted in this order; each {tissue: coverage in [0, 1] of shape (H, W, D)}, exclusive within a layer.
        surface_mm: (H, W, D) signed distance to the heart's blood pools, for appearance.
        points_mm: world positions of landmarks (RAS mm from the centre).
        parameters: what was drawn, json-serialisable.
    """

    label: NDArray[np.uint8]
    layers: list[dict[str, Array]]
    surface_mm: Array
    points_mm: dict[str, NDArray[np.float64]]
    parameters: dict[str, Any] = field(default_factory=dict)


def _assemble(
    frame: Frame, grids: tuple, shape: dict, d: dict, wall: Array, tube: dict, curve: dict, rng: np.random.Generator
) -> list[dict[str, Array]]:
    """All layers from the back to the front: coverages, of mutually exclusive tissues within a layer."""
    s, (x, y, _), height = frame.scale, grids[1], grids[0][2]
    airway = np.minimum(tube["trachea"], tube["bronchus"])
    soft = np.minimum.reduce([wall, tube["svc"] - 2, tube["ivc"] - 2, tube["oesophagus"] - 1, airway - 2])
    smooth = ndimage.gaussian_filter(np.clip(soft, -15, 25), 7.0 * s / frame.h)
    midline = np.maximum(np.abs(x - 50) - 9, 35 - np.abs(y)) * np.float32(s)
    special = {
        "vessels": lung_vessels(frame, curve, rng),
        "mediastinum": smooth_min(smooth - np.float32(shape["epicardial_fat"] * s), midline, 14.0),
    }
    front = [("airway_wall", airway - 1.5 * s), ("airway", airway), ("oesophagus", tube["oesophagus"]), ("wall", wall)]
    thorax = thorax_layers(frame, grids[1], shape, rng)
    behind = [(name, special.get(name, distance)) for name, distance in thorax] + front
    layers = [{name: coverage(distance, frame.h)} for name, distance in behind]
    layers.append({name: coverage(distance, frame.h) for name, distance in d.items()})
    for name, ramp in (("svc", (height - 34) / 16), ("ivc", (-12 - height) / 16)):  # inflow mixes over 16 mm
        layers.append({name: coverage(tube[name], frame.h) * np.clip(ramp, 0, 1)})
    return layers


def build_geometry(shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator) -> Geometry:
    """Draws one subject's geometry.

    Args:
        shape: (H, W, D), voxels along right, anterior, superior.
        spacing_mm: isotropic voxel size; the field of view must hold a heart (checked by `make_subject`).
        rng: all randomness of the geometry.

    Returns:
        Label map with the topology of `INTENDED_BETTI` and the layers to paint.

    Raises:
        TopologyError: if this draw cannot be given the intended topology; draw again.
    """
    frame = Frame(shape, spacing_mm, rng)
    measures = draw_measures(rng)
    grids = frame.model_grids()
    tube, curve = draw_vessels(frame, measures, rng)
    d, solid = heart_distances(frame, grids[0], measures, tube, rng)
    s = np.float32(frame.scale)
    atria = np.minimum.reduce([d["left_atrium"], d["right_atrium"], d["appendage"]]) - measures["atrial_wall"] * s
    vessels = np.minimum.reduce([d["aorta"], d["pulmonary_artery"], d["pulmonary_veins"]]) - 1.5 * s
    wall = np.minimum.reduce([solid, d["right_ventricle"] - measures["rv_wall"] * s, atria, vessels])
    size = float(np.sqrt(s) * rng.uniform(0.92, 1.06))  # vessels shrink less than the heart
    survey = Survey(frame, measures, d["right_ventricle"], wall, 1.9 * size + 0.6, rng)
    curves = coronary_curves(survey, size, rng)
    coronaries, lumen, kept = draw_coronaries(frame, curves, d["aorta"] < 0, np.minimum.reduce(list(d.values())) < 0)
    label = label_map(d | {"myocardium": carve(solid, (tube["lv_outflow"], 0.0))}, coronaries)
    layers = _assemble(frame, grids, measures, d, wall, tube, curve, rng)
    layers.append({"coronaries": coverage(lumen, spacing_mm)})
    blood = np.minimum.reduce([v for n, v in d.items() if n != "myocardium"])
    lengths = {n: curve_length(p) for n, p, _ in curves if n in kept}
    parameters = frame.parameters | measures | {"coronary_size": size, "coronary_length_mm": lengths}
    return Geometry(label, layers, blood, curve | {n: p for n, p, _ in curves}, parameters)
