"""The cases of a study: from a datalist, or from a folder with one image and one label map a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from custom.runs.files import write_json
from custom.volumes.cases import NoCaseError, load_cases
from custom.volumes.names import case_name

SECTIONS = ("training", "validation", "test")
_FEWEST = 3  # one to learn from, one that chooses weights, one that nothing was chosen by


def listed_cases(datalist: str) -> list[dict[str, Any]]:
    """All cases of a datalist, whether their files exist or not, each with its `section`.

    Raises:
        FileNotFoundError, ValueError: of `custom.volumes.cases.load_cases`.
    """
    cases: list[dict[str, Any]] = []
    for section in SECTIONS:
        try:
            cases += [{**case, "section": section} for case in load_cases(datalist, section, check=False)]
        except NoCaseError:
            continue
    if not cases:
        raise NoCaseError(f"{datalist}: no case in {', '.join(SECTIONS)}; list image and label of each case there")
    return cases


def cases_in(folder: str) -> list[dict[str, Any]]:
    """Cases `images/NAME.nii.gz` with `labels/NAME.nii.gz`; where one of both is missing it is named all the same.

    Raises:
        FileNotFoundError: when there is no image and no label map.
    """
    root = Path(folder).expanduser().resolve()
    files = {kind: {_name(f): f for f in sorted(root.glob(f"{kind}/*")) if _counts(f)} for kind in ("images", "labels")}
    names = sorted({name for found in files.values() for name in found})
    if not names:
        raise FileNotFoundError(
            f"{root}: no case there; put each image in HU under images/NAME.nii.gz and its label map under "
            "labels/NAME.nii.gz, or name a datalist"
        )

    def file(kind: str, name: str) -> str:
        return str(files[kind].get(name, root / kind / f"{name}.nii.gz"))

    return [{"image": file("images", n), "label": file("labels", n), "case": n, "section": ""} for n in names]


def _counts(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _name(file: Path) -> str:
    """Of a case; a file of another format keeps its case, whose check says what is wrong."""
    return case_name(file.name) if file.name.lower().endswith((".nii", ".nii.gz")) else file.stem


def label_sizes(cases: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Voxels of every label map, and the volume of one in mm^3; what cannot be read is left to its stage to refuse."""
    sizes = []
    for case in cases:
        try:
            image: Any = nib.load(case.get("label", ""))
        except (OSError, nib.filebasedimages.ImageFileError):
            continue
        sizes.append((float(np.prod(image.shape[:3])), float(np.prod(image.header.get_zooms()[:3]))))
    return sizes


def is_folder(datalist: str) -> bool:
    """Whether what is named as a datalist is a folder of cases."""
    return Path(datalist).expanduser().is_dir()


def divided(cases: Sequence[dict[str, Any]]) -> dict[str, Sequence[dict[str, Any]]]:
    """Cases of a folder by section: the last one by name tests, the one before chooses weights, the others teach.

    Raises:
        ValueError: for fewer than three.
    """
    if len(cases) < _FEWEST:
        raise ValueError(
            f"{len(cases)} cases: at least {_FEWEST} are needed, to learn from, to choose weights by, and to measure "
            "on; with fewer follow docs/FIVE_CASES.md step by step"
        )
    return {"training": cases[:-2], "validation": cases[-2:-1], "test": cases[-1:]}


def write_datalist(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """List cases of a folder as they are :func:`divided`.

    Raises:
        ValueError: for fewer than three.
    """
    listed = divided(cases).items()
    write_json(
        path, {section: [{k: case[k] for k in ("image", "label")} for case in found] for section, found in listed}
    )
