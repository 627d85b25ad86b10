"""A procedural contrast-enhanced cardiac CT with exact labels: subjects, cohort and command line.

Geometry (`custom.phantom.anatomy`) and appearance (`custom.phantom.appearance`) are drawn from separate generators
seeded by (seed, subject index): a subject never depends on how many subjects or workers there are, and one anatomy can
be seen under another contrast.

    python -m custom.phantom make --output_dir DIR --subjects 40 --seed 0
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from custom.phantom.anatomy import Geometry, build_geometry
from custom.phantom.appearance import add_artefacts, draw_appearance, draw_noise, move_right_artery, paint, scan
from custom.phantom.labels import INTENDED_BETTI, LABELS, TopologyError
from custom.runs.files import read_json, replace_file, write_json
from custom.volumes.headers import placed_image
from numpy.typing import NDArray

__all__ = ["INTENDED_BETTI", "LABELS", "Subject", "make", "make_subject"]

logger = logging.getLogger(__name__)

VERSION = "0.1.0"
# Ours, by anatomy: a heart in 120 mm is drawn at two thirds of its size, and coronaries are hardly wider than 2.5 mm.
# The topology comes out on 96 mm and at 3 mm as well (eight subjects each).
MIN_FOV_MM, MAX_SPACING_MM = 120.0, 2.5
MAX_DRAWS = 40  # of a geometry; ours: 56 subjects took 5 at most, at 2.5 mm


@dataclass(frozen=True)
class Subject:
    """One synthetic case; arrays are (H, W, D) along right, anterior, superior.

    Attributes:
        image: int16 HU, with noise.
        label: uint8, ids of `LABELS`.
        clean: int16 HU, the same scan without noise (blurred by the same point spread).
        affine: (4, 4), voxel index to RAS mm.
        parameters: everything drawn, json-serialisable.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    clean: NDArray[np.int16]
    affine: NDArray[np.float64]
    parameters: dict[str, Any]


def _check_grid(shape: Any, spacing_mm: float) -> tuple[int, int, int]:
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


def _draw_anatomy(seed: int, index: int, shape: tuple[int, int, int], spacing_mm: float) -> tuple[Geometry, int]:
    """First draw whose label map has the intended topology, and its number."""
    for draw in range(MAX_DRAWS):
        try:
            return build_geometry(shape, spacing_mm, np.random.default_rng([seed, index, 0, draw])), draw
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

    Returns:
        The subject; `parameters` records what was drawn.

    Raises:
        ValueError: for a negative seed or index and for a grid that cannot hold a heart.
        TypeError: if `shape` is not three integers.
        TopologyError: if no geometry of the intended topology was found (not seen on grids of 2.25 mm and finer).
    """
    grid = _check_grid(shape, spacing_mm)
    look_seed = seed if appearance_seed is None else appearance_seed
    for name, value in (("seed", seed), ("index", index), ("appearance_seed", look_seed)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}; choose a non-negative integer.")
    anatomy, draw = _draw_anatomy(seed, index, grid, spacing_mm)
    rng = np.random.default_rng([look_seed, index, 1])
    look = draw_appearance(rng if appearance_seed is None else np.random.default_rng([appearance_seed, 3]))
    hu = paint(anatomy, look, spacing_mm, rng)
    found: dict[str, Any] = {}
    if artefacts:
        artefact_rng = np.random.default_rng([look_seed, index, 2])
        found = add_artefacts(hu, anatomy, spacing_mm, artefact_rng)
        found["rca_motion_mm"] = move_right_artery(hu, anatomy, spacing_mm, artefact_rng)
    clean = scan(hu, look, spacing_mm)
    image = clean + draw_noise(grid, look, spacing_mm, rng)
    parameters = {"seed": seed, "index": index, "appearance_seed": look_seed, "draw": draw, "artefacts": found}
    parameters |= {"anatomy": anatomy.parameters, "appearance": look}
    to_hu = [np.clip(np.rint(a), -1024, 3071).astype(np.int16) for a in (image, clean)]
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    return Subject(to_hu[0], anatomy.label, to_hu[1], affine, json.loads(json.dumps(parameters, default=float)))


FOLDERS = {"image": "images", "label": "labels", "clean": "clean"}


def _write_subject(root: Path, index: int, provenance: dict[str, Any]) -> dict[str, Any]:
    """Makes and writes one subject; returns its parameters. Runs in a worker."""
    options = {k: provenance[k] for k in ("seed", "spacing_mm", "artefacts")}
    subject = make_subject(index=index, shape=tuple(provenance["shape"]), **options)
    for key, folder in FOLDERS.items():
        nifti = placed_image(getattr(subject, key), subject.affine)
        replace_file(root / folder / f"subject_{index:03d}.nii.gz", partial(nib.save, nifti))
    return subject.parameters


def _check_folder(root: Path, names: list[str], provenance: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the subjects already there; ValueError if the folder holds anything that is not this cohort."""
    record = root / "parameters.json"
    allowed = {root / folder / f"{name}.nii.gz" for folder in FOLDERS.values() for name in names}
    allowed |= {record, root / "datalist.json"}
    for path in sorted(root.rglob("*")) if root.exists() else []:
        if path.is_file() and path not in allowed and not path.name.startswith(".part_"):
            raise ValueError(f"output_dir must hold nothing but this cohort, found {path}; choose an empty folder.")
    if not record.exists():
        if any(path.exists() for path in allowed):
            raise ValueError(f"output_dir has data but no {record}, its origin is unknown; choose an empty folder.")
        return {}
    found = read_json(record, "choose another output_dir, or delete this one if nothing in it is needed")
    if found.get("provenance") != provenance:
        raise ValueError(
            f"{record} was made with {found.get('provenance')}, now asked for {provenance}; use the same arguments to "
            "continue, or choose another output_dir."
        )
    whole = [n for n in names if all((root / folder / f"{n}.nii.gz").exists() for folder in FOLDERS.values())]
    return {n: found["subjects"][n] for n in whole if n in found["subjects"]}


def _split(names: list[str], validation: float, test: float) -> dict[str, list[dict[str, str]]]:
    """Decathlon lists; with three subjects or more every list with a positive fraction has at least one."""
    n = len(names)
    n_val, n_test = (max(int(round(f * n)), int(f > 0 and n >= 3)) for f in (validation, test))
    ends = {
        "training": (0, n - n_val - n_test),
        "validation": (n - n_val - n_test, n - n_test),
        "test": (n - n_test, n),
    }
    item = {n: {k: f"{folder}/{n}.nii.gz" for k, folder in FOLDERS.items()} | {"subject": n} for n in names}
    return {key: [item[name] for name in names[a:b]] for key, (a, b) in ends.items()}


def _check_cohort(subjects: int, workers: int, validation: float, test: float, artefacts: bool | str) -> None:
    """Validates the arguments of `make` that are not the grid's."""
    for name, value in (("subjects", subjects), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; pass --{name} 1 or more.")
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            "validation_fraction and test_fraction must be at least 0 and below 1 together, got "
            f"{validation} and {test}; use for example 0.15 and 0.15."
        )
    if str(artefacts).lower() not in ("true", "false"):
        raise ValueError(f"artefacts must be true or false, got {artefacts!r}; pass --artefacts true.")


def make(
    output_dir: str,
    subjects: int = 40,
    seed: int = 0,
    *,
    shape: tuple[int, int, int] = (96, 96, 96),
    spacing_mm: float = 1.5,
    artefacts: bool | str = False,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    workers: int = 1,
) -> str:
    """Writes a cohort: images/, labels/, clean/ (NIfTI), parameters.json with provenance, and last datalist.json.

    Started again with the same arguments it makes only what is missing.

    Args:
        output_dir: a new or empty folder, or one that this command began.
        subjects: how many, at least 1.
        seed, shape, spacing_mm, artefacts: see `make_subject`; artefacts also takes the words true and false.
        validation_fraction, test_fraction: shares of the subjects, both at least 0 and below 1 together.
        workers: processes, at least 1. The result does not depend on it.

    Returns:
        Path of datalist.json (lists "training", "validation", "test"; paths relative to it).

    Raises:
        ValueError: for values out of range, and for a folder that holds something else.
    """
    _check_cohort(subjects, workers, validation_fraction, test_fraction, artefacts)
    grid = _check_grid(shape, spacing_mm)
    provenance = {"generator": "custom.phantom", "version": VERSION, "seed": seed, "subjects": subjects}
    provenance |= {"shape": list(grid), "spacing_mm": spacing_mm, "artefacts": str(artefacts).lower() == "true"}
    provenance |= {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    root, names = Path(output_dir), [f"subject_{i:03d}" for i in range(subjects)]
    done = _check_folder(root, names, provenance)
    missing = [i for i, name in enumerate(names) if name not in done]
    write_json(root / "parameters.json", {"provenance": provenance, "subjects": done})
    logger.info("%d of %d subjects to make in %s", len(missing), subjects, root)
    for i, parameters in _each(root, missing, provenance, workers):
        done[names[i]] = parameters
        write_json(root / "parameters.json", {"provenance": provenance, "subjects": done})
        logger.info("%s written", names[i])
    write_json(root / "datalist.json", _split(names, validation_fraction, test_fraction) | {"provenance": provenance})
    return str(root / "datalist.json")


def _each(
    root: Path, missing: list[int], provenance: dict[str, Any], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Makes the missing subjects, here or in worker processes, in order."""
    if workers == 1:
        for i in missing:
            yield i, _write_subject(root, i, provenance)
        return
    with ProcessPoolExecutor(workers) as pool:
        jobs = [(i, pool.submit(_write_subject, root, i, provenance)) for i in missing]
        for i, job in jobs:
            yield i, job.result()
