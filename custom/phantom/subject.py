"""One subject of the cardiac CT phantom, plain or of the "clinic" style.

Geometry and appearance are drawn from separate generators seeded by (seed, subject index): a subject never depends on
how many subjects or workers there are, and one anatomy can be seen under another contrast.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from custom.phantom.anatomy import Geometry, build_geometry
from custom.phantom.annotation import annotate
from custom.phantom.appearance import add_artefacts, draw_appearance, draw_noise, move_right_artery, paint, scan
from custom.phantom.contrast import add_trends, draw_look, paint_layers, reconstruct
from custom.phantom.disease import add_disease, add_motion
from custom.phantom.geometry import Array
from custom.phantom.labels import TopologyError
from custom.phantom.projection import beam_hardening
from custom.phantom.scene import Clinic, build_clinic
from numpy.typing import NDArray

__all__ = ["STYLES", "Subject", "check_grid", "check_style", "make_subject"]

logger = logging.getLogger(__name__)

STYLES = ("plain", "clinic")
# Ours, by anatomy: a heart in 120 mm is drawn at two thirds of its size, and coronaries are hardly wider than 2.5 mm.
# The topology comes out on 96 mm and at 3 mm as well (eight subjects each).
MIN_FOV_MM, MAX_SPACING_MM = 120.0, 2.5
MAX_DRAWS = 40  # of a geometry; ours: 56 subjects took 5 at most, at 2.5 mm


@dataclass(frozen=True)
class Subject:
    """One synthetic case; arrays are (H, W, D) along right, anterior, superior.

    Attributes:
        image: int16 HU, with noise.
        label: uint8, ids of `LABELS`; with label noise, as an annotator would have drawn it.
        clean: int16 HU, the same scan without noise (blurred by the same point spread).
        affine: (4, 4), voxel index to RAS mm.
        parameters: everything drawn, json-serialisable.
        exact: with label noise, the exact label beside `label`; else None.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    clean: NDArray[np.int16]
    affine: NDArray[np.float64]
    parameters: dict[str, Any]
    exact: NDArray[np.uint8] | None = None


def check_grid(shape: Any, spacing_mm: float) -> tuple[int, int, int]:
    """Validates the grid of the public functions."""
    try:
        grid = tuple(int(n) for n in shape)
    except (TypeError, ValueError) as error:
        raise TypeError(f"shape must be three integers, got {shape!r}; pass for example 96,96,96.") from error
    if len(grid) != 3 or min(grid) < 48:
        raise ValueError(f"shape must be three sizes of at least 48 voxels, got {grid}; use for example 96,96,96.")
    if not 0 < spacing_mm <= MAX_SPACING_MM:
        raise ValueError(f"spacing_mm must be in (0, {MAX_SPACING_MM}], got {spacing_mm}; use for example 1.5.")
    if min(grid) * spacing_mm < MIN_FOV_MM:
        raise ValueError(
            f"shape * spacing_mm must be at least {MIN_FOV_MM} mm along every axis to hold a heart, got "
            f"{[round(n * spacing_mm, 1) for n in grid]} mm; enlarge shape or spacing_mm."
        )
    return grid  # type: ignore[return-value]


def check_style(style: str, artefacts: bool) -> None:
    """Validates the style of the public functions."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}; pass --style clinic.")
    if style == "clinic" and artefacts:
        raise ValueError("artefacts are drawn for every subject of style clinic; leave --artefacts out.")


Drawn = TypeVar("Drawn")


def _draw_anatomy(
    build: Callable[[tuple[int, int, int], float, np.random.Generator], Drawn],
    seed: int,
    index: int,
    shape: tuple[int, int, int],
    spacing_mm: float,
) -> tuple[Drawn, int]:
    """First draw whose label map has the intended topology, and its number."""
    for draw in range(MAX_DRAWS):
        try:
            return build(shape, spacing_mm, np.random.default_rng([seed, index, 0, draw])), draw
        except TopologyError as error:
            logger.debug("subject %d, draw %d: %s", index, draw, error)
    raise TopologyError(
        f"none of {MAX_DRAWS} draws for seed {seed}, subject {index} has the intended topology; use another seed or a "
        "finer grid."
    )


def make_subject(
    seed: int,
    index: int,
    *,
    shape: tuple[int, int, int] = (96, 96, 96),
    spacing_mm: float = 1.5,
    artefacts: bool = False,
    appearance_seed: int | None = None,
    style: str = "plain",
    label_noise: bool = False,
) -> Subject:
    """Makes one synthetic cardiac CT with its labels.

    Args:
        seed: cohort seed, at least 0.
        index: subject number, at least 0; the subject depends on (seed, index) only.
        shape: (H, W, D) voxels along right, anterior, superior, each at least 48.
        spacing_mm: isotropic voxel size in (0, 2.5]; shape * spacing_mm must be at least 120 mm. A heart that would
            not fit is scaled down (144 mm hold a heart at about 80 %).
        artefacts: adds calcified plaques, contrast streaks and mixing, and motion of the right coronary artery.
        appearance_seed: another value keeps the anatomy and redraws contrast, texture and noise. Contrast, noise level
            and kernel then depend on it alone, so anatomies of one `appearance_seed` look alike; None draws them by
            subject.
        style: "plain", or "clinic": a whole chest, varied hearts, contrast, fields of view and scanners. There `shape`
            is the largest grid, of which a subject fills what its field of view needs; hearts have their own size.
        label_noise: shifts the boundaries of the label and leaves out distal vessels, as an annotator might; the exact
            label is kept beside it.

    Returns:
        The subject; `parameters` records what was drawn.

    Raises:
        ValueError: for a negative seed or index, an unknown style, and a grid that cannot hold a heart.
        TypeError: if `shape` is not three integers.
        TopologyError: if no geometry of the intended topology was found (not seen on grids of 2.25 mm and finer).
    """
    grid = check_grid(shape, spacing_mm)
    check_style(style, artefacts)
    look_seed = seed if appearance_seed is None else appearance_seed
    for name, value in (("seed", seed), ("index", index), ("appearance_seed", look_seed)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}; choose a non-negative integer.")
    rng = np.random.default_rng([look_seed, index, 1])
    look_rng = rng if appearance_seed is None else np.random.default_rng([appearance_seed, 3])
    artefact_rng = np.random.default_rng([look_seed, index, 2])
    if style == "clinic":
        body, draw = _draw_anatomy(build_clinic, seed, index, grid, spacing_mm)
        label, (look, clean, found) = body.label, _scan_clinic(body, spacing_mm, look_rng, rng, artefact_rng)
    else:
        anatomy, draw = _draw_anatomy(build_geometry, seed, index, grid, spacing_mm)
        chosen = artefact_rng if artefacts else None
        label, (look, clean, found) = anatomy.label, _scan_plain(anatomy, spacing_mm, look_rng, rng, chosen)
    image = clean + draw_noise(label.shape, look, spacing_mm, rng)
    parameters: dict[str, Any] = {"seed": seed, "index": index, "appearance_seed": look_seed, "draw": draw}
    parameters |= found | {"appearance": look}
    to_hu = [np.clip(np.rint(a), -1024, 3071).astype(np.int16) for a in (image, clean)]
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    exact = None
    if label_noise:
        exact = label
        label, parameters["annotation"] = annotate(exact, spacing_mm, np.random.default_rng([seed, index, 4]))
    return Subject(to_hu[0], label, to_hu[1], affine, json.loads(json.dumps(parameters, default=float)), exact)


Scanned = tuple[dict[str, Any], Array, dict[str, Any]]
"""What was drawn of the scan, the scan without noise, and what else was drawn."""


def _scan_plain(
    anatomy: Geometry,
    spacing_mm: float,
    look_rng: np.random.Generator,
    rng: np.random.Generator,
    artefact_rng: np.random.Generator | None,
) -> Scanned:
    look = draw_appearance(look_rng)
    hu = paint(anatomy, look, spacing_mm, rng)
    found: dict[str, Any] = {}
    if artefact_rng is not None:
        found = add_artefacts(hu, anatomy, spacing_mm, artefact_rng)
        found["rca_motion_mm"] = move_right_artery(hu, anatomy, spacing_mm, artefact_rng)
    return look, scan(hu, look, spacing_mm), {"artefacts": found, "anatomy": anatomy.parameters}


def _scan_clinic(
    body: Clinic,
    spacing_mm: float,
    look_rng: np.random.Generator,
    rng: np.random.Generator,
    artefact_rng: np.random.Generator,
) -> Scanned:
    look = draw_look(look_rng)
    hu = paint_layers(body.layers, body.label.shape, look, rng)
    add_trends(hu, body, look, rng)
    found = add_disease(hu, body, look, artefact_rng)
    found["beam_hardening"] = float(artefact_rng.uniform(0.3, 2.0))
    hu += beam_hardening(hu, spacing_mm, found["beam_hardening"])
    found |= add_motion(hu, body, found, artefact_rng)
    betti = {str(k): list(numbers) for k, numbers in body.betti.items()}
    drawn = {"artefacts": found, "anatomy": body.parameters, "intended_betti": betti}
    return look, reconstruct(hu, look, spacing_mm), drawn
