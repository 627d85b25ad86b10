"""Volumes of a few cases for the viewer of the page, as small as the page needs."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from custom.synthesis.page.assembling import spread
from custom.synthesis.page.niivue import NiiVue
from custom.synthesis.page.volumes import Case, cropped, resampled
from custom.volumes.colours import label_colour
from custom.volumes.pictures import heart_centre
from jinja2.utils import htmlsafe_json_dumps
from numpy.typing import NDArray

__all__ = ["for_viewer", "viewer_data", "viewer_section"]

_MARGIN_MM = 15.0  # ours: of what lies around the heart
_STEP_HU = 5.0  # ours: a screen shows the widest window in steps of 6 HU, and noise hides finer ones
_LIMITS_HU = (-1024, 3071)
_LADDER = ((3, 1.0), (3, 1.25), (3, 1.5), (2, 1.25), (2, 1.5), (3, 2.0), (2, 2.0), (1, 1.5), (1, 2.0), (1, 3.0))
"""Cases and spacing in mm, tried one after the other until the page is small enough. Ours."""

Shown = tuple[Mapping[str, str], Case, Case]
"""Texts (`case`, `template`, `note`), a synthetic case and its template, both of `for_viewer`."""


def _encoded(volume: NDArray, spacing_mm: Sequence[float], centre: Sequence[int], kind: type) -> str:
    """Base64 of a compressed NIfTI whose origin is the centre of the heart: hearts of two cases lie on each other."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -np.asarray(spacing_mm) * centre
    image = nib.Nifti1Image(np.ascontiguousarray(volume.astype(kind)), affine)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode()


def for_viewer(case: Case, vessel_labels: Sequence[int]) -> Case:
    """A case cropped to the heart, at the finest spacing that is tried: coarser ones are made of it, in no time."""
    return resampled(cropped(case, _MARGIN_MM), min(spacing_mm for _, spacing_mm in _LADDER), vessel_labels)


def _volumes(case: Case, spacing_mm: float, vessel_labels: Sequence[int]) -> dict[str, str]:
    """A case of `for_viewer`, resampled."""
    small = resampled(case, spacing_mm, vessel_labels)
    centre = heart_centre(small.label)
    image = np.clip((small.image / _STEP_HU).round() * _STEP_HU, *_LIMITS_HU)
    encoded = {
        "image": _encoded(image, small.spacing_mm, centre, np.int16),
        "label": _encoded(small.label.round(), small.spacing_mm, centre, np.uint8),
    }
    if small.confidence is not None:
        doubt = (20 * (1 - small.confidence)).clip(0, 20).round() * 5
        encoded["doubt"] = _encoded(doubt, small.spacing_mm, centre, np.uint8)
    return encoded


def viewer_data(
    cases: Sequence[Shown], *, label_names: Sequence[str], vessel_labels: Sequence[int], spacing_mm: float
) -> dict[str, Any]:
    """What `viewer.js` reads.

    Args:
        cases: one at least.
        label_names: one for each id, background first.
        vessel_labels: ids of vessels, which stay connected.
        spacing_mm: of the volumes, where they have finer ones.

    Returns:
        `labels` (name and colour, background first), `cases`, each with its texts and `synthetic`, and `templates`
        by name. Volumes are base64 of compressed NIfTI: `image` HU in steps of 5, `label` ids, `doubt` 100 times 1
        less the confidence, in steps of 5.
    """
    shown: list[dict[str, Any]] = []
    templates: dict[str, dict[str, str]] = {}
    for texts, case, template in cases:
        shown.append({**texts, "synthetic": _volumes(case, spacing_mm, vessel_labels)})
        if texts["template"] not in templates:
            templates[texts["template"]] = _volumes(template, spacing_mm, vessel_labels)
    labels = [{"name": name, "colour": label_colour(k)} for k, name in enumerate(label_names)]
    return {"labels": labels, "cases": shown, "templates": templates}


def viewer_section(
    cases: Sequence[Shown], niivue: NiiVue, *, label_names: Sequence[str], vessel_labels: Sequence[int], room: int
) -> dict[str, Any] | None:
    """Library and volumes of as many cases, at as fine a spacing, as fit.

    Args:
        cases, label_names, vessel_labels: as :func:`viewer_data`; two or three of them when not all fit.
        niivue: the library, which is there.
        room: bytes on the page, for library and data.

    Returns:
        `library`, base64 of the compressed module, `data` and `version`; None when not even one case fits.
    """
    library = base64.b64encode(gzip.compress(niivue.module.encode(), 9, mtime=0)).decode()
    for count, spacing_mm in _LADDER:
        if 1 < count > len(cases):
            continue
        some = spread(cases, count)
        data = viewer_data(some, label_names=label_names, vessel_labels=vessel_labels, spacing_mm=spacing_mm)
        if len(library) + len(htmlsafe_json_dumps(data)) <= room:
            return {"library": library, "data": data, "version": niivue.version}
    return None
