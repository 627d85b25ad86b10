"""A synthetic case beside its template, as one picture large enough to judge."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from custom.synthesis.page.volumes import MARGIN_MM, Case, cropped
from custom.volumes.colours import label_colour
from custom.volumes.pictures import WINDOW_HU, heart_centre, planes, vessel_projection
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["pair_picture"]

_BAR_MM = 50.0
_PLANES = (("axial", "R", "L"), ("coronal", "R", "L"), ("sagittal", "A", "P"))
_AXES_OF_PLANES = ((0, 1), (0, 2), (1, 2))  # across and down
_QUALITY = 82  # of WebP, ours: a picture has 100 to 200 KB, and noise still looks like noise


def _aspect(case: Case, plane: int) -> float:
    across, down = (case.spacing_mm[axis] for axis in _AXES_OF_PLANES[plane])
    return float(down / across)


def _show(axis: Axes, plane: NDArray, aspect: float) -> None:
    axis.imshow(plane, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], interpolation="nearest", aspect=aspect)


def _outline(axis: Axes, mask: NDArray, vessel_labels: Sequence[int]) -> None:
    """Outlines of the labels of a slice; vessels, small as they are, last and thicker."""
    present = [int(k) for k in np.unique(mask) if k > 0]
    for k in sorted(present, key=lambda k: k in vessel_labels):
        width = 1.6 if k in vessel_labels else 1.0
        axis.contour(mask == k, [0.5], colors=[label_colour(k)], linewidths=width)


def _letters(axis: Axes, left: str, right: str) -> None:
    """Which side of the patient is which."""
    for place, letter in ((0.015, left), (0.985, right)):
        axis.text(
            place,
            0.5,
            letter,
            transform=axis.transAxes,
            color="#ffd76a",
            fontsize=10,
            ha="left" if place < 0.5 else "right",
            va="center",
        )


def _title(axis: Axes, text: str) -> None:
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}
    axis.text(0.015, 0.98, text, transform=axis.transAxes, color="white", fontsize=9, va="top", bbox=box)


def _bar(axis: Axes, plane: NDArray, spacing_mm: float) -> None:
    """A line of 5 cm at the lower edge."""
    length = _BAR_MM / spacing_mm
    if length < plane.shape[1]:
        right, y = plane.shape[1] * 0.97, plane.shape[0] * 0.95
        axis.plot([right - length, right], [y, y], color="white", linewidth=2)
        axis.text(right, y, "5 cm ", color="white", fontsize=8, ha="right", va="bottom")


def _row(axes: Sequence[Axes], case: Case, title: str, vessel_labels: Sequence[int], *, outlined: bool) -> None:
    """Three slices through the centre of the heart."""
    centre = heart_centre(case.label)
    pairs = zip(planes(case.image, centre), planes(case.label, centre), strict=True)
    for number, (axis, (plane, mask), (name, left, right)) in enumerate(zip(axes, pairs, _PLANES, strict=True)):
        _show(axis, plane, _aspect(case, number))
        if outlined:
            _outline(axis, mask, vessel_labels)
        _title(axis, f"{title}, {name}")
        _letters(axis, left, right)
    _bar(axes[0], planes(case.image, centre)[0], case.spacing_mm[0])


def _doubt(axis: Axes, case: Case) -> None:
    """The axial slice, the less confident the redder."""
    centre = heart_centre(case.label)
    _show(axis, planes(case.image, centre)[0], _aspect(case, 0))
    if case.confidence is not None:
        doubt = 1 - planes(case.confidence, centre)[0]
        axis.imshow(np.ones_like(doubt), cmap="autumn", vmin=1, vmax=2, alpha=0.75 * doubt, aspect=_aspect(case, 0))
    _title(axis, "doubt in red, axial")
    _letters(axis, "R", "L")


def _vessels(axis: Axes, case: Case, title: str, vessel_labels: Sequence[int]) -> None:
    """What the image shows around the vessels, seen from the front."""
    _show(axis, vessel_projection(case.image, case.label, vessel_labels), _aspect(case, 1))
    _title(axis, title)
    _letters(axis, "R", "L")


def pair_picture(case: Case, template: Case, *, vessel_labels: Sequence[int]) -> bytes:
    """WebP of a synthetic case above its template.

    Rows: the image alone; with the outlines of its label map; the template with those of its own. Columns: axial,
    coronal and sagittal slices through the centre of the heart, radiological convention, and vessels from the front,
    between them the confidence.

    Args:
        case: of the set.
        template: what it was made after.
        vessel_labels: ids that are drawn last and projected.
    """
    case, template = cropped(case, MARGIN_MM), cropped(template, MARGIN_MM)
    figure = Figure(figsize=(13.2, 9.9), facecolor="black")
    edge_to_edge = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.02, "hspace": 0.02}
    axes = figure.subplots(3, 4, gridspec_kw=edge_to_edge)
    for axis in axes.ravel():
        axis.set_axis_off()
    _row(axes[0, :3], case, "synthetic", vessel_labels, outlined=False)
    _row(axes[1, :3], case, "with its label map", vessel_labels, outlined=True)
    _vessels(axes[0, 3], case, "synthetic, vessels from the front", vessel_labels)
    _doubt(axes[1, 3], case)
    _row(axes[2, :3], template, "template", vessel_labels, outlined=True)
    _vessels(axes[2, 3], template, "template, vessels from the front", vessel_labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=100, pil_kwargs={"quality": _QUALITY})
    return buffer.getvalue()
