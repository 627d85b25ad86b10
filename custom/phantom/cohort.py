"""A cohort of cardiac CT phantoms with exact labels: files and command line.

python -m custom.phantom make --output_dir DIR --subjects 40 --seed 0
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
from custom.phantom.labels import INTENDED_BETTI, LABELS
from custom.phantom.subject import Subject, check_grid, check_style, make_subject
from custom.runs.files import read_json, replace_file, write_json
from custom.volumes.headers import placed_image

__all__ = ["INTENDED_BETTI", "LABELS", "Subject", "make", "make_subject"]

logger = logging.getLogger(__name__)

VERSION = "0.1.0"
_DELETE = "choose another output_dir, or delete this one if nothing in it is needed"
_OPTIONS = ("seed", "spacing_mm", "artefacts", "style", "label_noise")
FOLDERS = {"image": "images", "label": "labels", "clean": "clean"}


def _folders(provenance: dict[str, Any]) -> dict[str, str]:
    """Key of a list and array of a subject -> folder; with label noise also that of the exact labels."""
    return FOLDERS | ({"exact": "exact"} if provenance.get("label_noise") else {})


def _write_subject(root: Path, index: int, provenance: dict[str, Any]) -> dict[str, Any]:
    """Makes and writes one subject; returns its parameters. Runs in a worker."""
    options = {k: provenance[k] for k in _OPTIONS if k in provenance}
    subject = make_subject(index=index, shape=tuple(provenance["shape"]), **options)
    for key, folder in _folders(provenance).items():
        nifti = placed_image(getattr(subject, key), subject.affine)
        replace_file(root / folder / f"subject_{index:03d}.nii.gz", partial(nib.save, nifti))
    return subject.parameters


def _check_folder(root: Path, names: list[str], provenance: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the subjects already there; ValueError if the folder holds anything that is not this cohort."""
    record = root / "parameters.json"
    found = read_json(record, _DELETE) if record.exists() else None
    if found is not None and found.get("provenance") != provenance:
        raise ValueError(
            f"{record} was made with {found.get('provenance')}, now asked for {provenance}; use the same arguments to "
            "continue, or choose another output_dir."
        )
    folders = _folders(provenance).values()
    allowed = {root / folder / f"{name}.nii.gz" for folder in folders for name in names}
    allowed |= {record, root / "datalist.json"}
    for path in sorted(root.rglob("*")) if root.exists() else []:
        if path.is_file() and path not in allowed and not path.name.startswith(".part_"):
            raise ValueError(f"output_dir must hold nothing but this cohort, found {path}; choose an empty folder.")
    if found is None:
        if any(path.exists() for path in allowed):
            raise ValueError(f"output_dir has data but no {record}, its origin is unknown; choose an empty folder.")
        return {}
    whole = [n for n in names if all((root / folder / f"{n}.nii.gz").exists() for folder in folders)]
    return {n: found["subjects"][n] for n in whole if n in found["subjects"]}


def _split(
    names: list[str], validation: float, test: float, folders: dict[str, str]
) -> dict[str, list[dict[str, str]]]:
    """Decathlon lists; with three subjects or more every list with a positive fraction has at least one."""
    n = len(names)
    n_val, n_test = (max(int(round(f * n)), int(f > 0 and n >= 3)) for f in (validation, test))
    ends = {
        "training": (0, n - n_val - n_test),
        "validation": (n - n_val - n_test, n - n_test),
        "test": (n - n_test, n),
    }
    item = {n: {k: f"{folder}/{n}.nii.gz" for k, folder in folders.items()} | {"subject": n} for n in names}
    return {key: [item[name] for name in names[a:b]] for key, (a, b) in ends.items()}


def _check_cohort(subjects: int, workers: int, validation: float, test: float, flags: dict[str, bool | str]) -> None:
    """Validates the arguments of `make` that are not the grid's."""
    for name, value in (("subjects", subjects), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; pass --{name} 1 or more.")
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            "validation_fraction and test_fraction must be at least 0 and below 1 together, got "
            f"{validation} and {test}; use for example 0.15 and 0.15."
        )
    for name, flag in flags.items():
        if str(flag).lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {flag!r}; pass --{name} true.")


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
    style: str = "plain",
    label_noise: bool | str = False,
) -> str:
    """Writes a cohort: images/, labels/, clean/ (NIfTI), parameters.json with provenance, and last datalist.json.

    Started again with the same arguments it makes only what is missing.

    Args:
        output_dir: a new or empty folder, or one that this command began.
        subjects: how many, at least 1.
        seed, shape, spacing_mm, artefacts, style, label_noise: see `make_subject`; artefacts and label_noise also take
            the words true and false. With label noise a folder exact/ holds the exact labels.
        validation_fraction, test_fraction: shares of the subjects, both at least 0 and below 1 together.
        workers: processes, at least 1. The result does not depend on it.

    Returns:
        Path of datalist.json (lists "training", "validation", "test"; paths relative to it).

    Raises:
        ValueError: for values out of range, and for a folder that holds something else.
    """
    flags = {"artefacts": artefacts, "label_noise": label_noise}
    _check_cohort(subjects, workers, validation_fraction, test_fraction, flags)
    artefacts, label_noise = (str(flag).lower() == "true" for flag in flags.values())
    grid = check_grid(shape, spacing_mm)
    check_style(style, artefacts)
    provenance = {"generator": "custom.phantom", "version": VERSION, "seed": seed, "subjects": subjects}
    provenance |= {"shape": list(grid), "spacing_mm": spacing_mm, "artefacts": artefacts}
    provenance |= {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    if style != "plain":  # what older cohorts do not name is as it was, and they go on
        provenance["style"] = style
    if label_noise:
        provenance["label_noise"] = True
    root, names = Path(output_dir), [f"subject_{i:03d}" for i in range(subjects)]
    done = _check_folder(root, names, provenance)
    missing = [i for i, name in enumerate(names) if name not in done]
    write_json(root / "parameters.json", {"provenance": provenance, "subjects": done})
    logger.info("%d of %d subjects to make in %s", len(missing), subjects, root)
    for i, parameters in _each(root, missing, provenance, workers):
        done[names[i]] = parameters
        write_json(root / "parameters.json", {"provenance": provenance, "subjects": done})
        logger.info("%s written", names[i])
    lists = _split(names, validation_fraction, test_fraction, _folders(provenance))
    write_json(root / "datalist.json", lists | {"provenance": provenance})
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
