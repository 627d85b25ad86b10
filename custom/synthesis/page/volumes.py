"""Cases of a set and their templates as the report shows them: upright, cropped to the labels, with their spacing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from custom.geometry.topology import bounding_box, grown_box
from custom.volumes.grids import spacing_of
from custom.volumes.names import case_names
from custom.volumes.pictures import read_one, turned
from custom.volumes.reading import read_labels
from custom.volumes.resampling import ToSpacingd, working_spacing
from monai.data import MetaTensor
from numpy.typing import NDArray

__all__ = ["MARGIN_MM", "Case", "SetVolumes", "cropped", "resampled"]

MARGIN_MM = 20.0
"""Of what is kept around the labels, ours: lung and chest wall beside the heart, by which one sees where it lies."""

Record = Mapping[str, Any]


class Case(NamedTuple):
    """One case; volumes are (H, W, D) in RAS.

    Attributes:
        image: HU.
        label: ids.
        confidence: 0 to 1; None for a template, which has none.
        spacing_mm: of the voxels, along each axis.
    """

    image: NDArray
    label: NDArray
    confidence: NDArray | None
    spacing_mm: Sequence[float]


class SetVolumes:
    """Cases of a set and their templates, read when they are asked for and cut to the labels and a margin.

    Args:
        root: of the set.
        records: of its cases.
        provenance: of the set.
    """

    def __init__(self, root: Path, records: Sequence[Record], provenance: Mapping[str, Any]) -> None:
        self.root = root
        self.mapping = provenance.get("label_mapping", {"from": [], "to": []})  # which older sets lack
        self.templates = {_files(record): record["template"] for record in records}
        names = case_names([image for image, _ in self.templates])
        self.names = dict(zip(self.templates, names, strict=True))

    def synthetic(self, record: Record) -> Case:
        """The case itself.

        Raises:
            FileNotFoundError, ValueError: naming a file that is not one volume.
        """
        image, label, confidence = (self.root / record["paths"][key] for key in ("image", "label", "confidence"))
        return _case(turned(read_one(label)), image, confidence)

    def template(self, record: Record) -> Case:
        """What a case was made after, its label map in the ids of the model; errors as of `synthetic`."""
        files = _files(record)
        return _case(turned(read_labels(self.templates[files], self.mapping)), Path(files[0]), None)

    def template_name(self, record: Record) -> str:
        """Name of that."""
        return self.names[_files(record)]


def _files(record: Record) -> tuple[str, str]:
    return record["template"]["image"], record["template"]["label"]


def _case(label: MetaTensor, image: Path, confidence: Path | None) -> Case:
    """A case of a label map in RAS and the files beside it, read one after the other."""
    values = label[0].numpy()
    ids = np.ascontiguousarray(values.astype(np.min_scalar_type(int(values.max()))))
    # Blocks of 2 x 2 x 2 voxels, in which noise is measured, stay those of the whole volume.
    sides = _around(ids, label.pixdim.tolist(), MARGIN_MM)
    box = tuple(slice(side.start - side.start % 2, side.stop) for side in sides)
    hu = turned(read_one(image))
    spacing_mm = spacing_of(hu)
    hu_values = np.ascontiguousarray(hu[0].numpy()[box])
    del hu
    trust = None if confidence is None else np.ascontiguousarray(turned(read_one(confidence))[0].numpy()[box])
    return Case(hu_values, np.ascontiguousarray(ids[box]), trust, spacing_mm)


def _around(label: NDArray, spacing_mm: Sequence[float], margin_mm: float) -> tuple[slice, slice, slice]:
    """Box around all labels; of the whole volume when it has none."""
    held = label > 0
    if not held.any():
        h, w, d = (slice(0, n) for n in label.shape)
        return h, w, d
    return grown_box(bounding_box(held), [round(margin_mm / edge) for edge in spacing_mm])


def cropped(case: Case, margin_mm: float) -> Case:
    """A case cut to a box around all its labels; the whole case when it has none."""
    box = _around(case.label, case.spacing_mm, margin_mm)
    confidence = None if case.confidence is None else case.confidence[box]
    return Case(case.image[box], case.label[box], confidence, case.spacing_mm)


def resampled(case: Case, spacing_mm: float, vessel_labels: Sequence[int]) -> Case:
    """A case at one spacing along all axes, its own coarsest one where that is coarser; vessels stay connected.

    Args:
        case: volumes of the heart.
        spacing_mm: of the result, at least.
        vessel_labels: ids of vessels.
    """
    affine = torch.diag(torch.tensor([*case.spacing_mm, 1.0], dtype=torch.float64))
    volumes = {name: volume for name, volume in case._asdict().items() if isinstance(volume, np.ndarray)}
    item: dict[Hashable, Any] = {
        name: MetaTensor(np.ascontiguousarray(volume)[None], affine=affine) for name, volume in volumes.items()
    }
    bring = ToSpacingd(
        list(volumes),
        label_keys=["label"],
        spacing_mm=[spacing_mm, max(spacing_mm, *case.spacing_mm)],
        follow="image",
        thin_labels=vessel_labels,
        linear_keys=["confidence"],
    )
    brought = {str(name): volume[0].numpy() for name, volume in bring(item).items()}
    spacing = working_spacing(case.spacing_mm, bring.spacing_mm)
    return Case(brought["image"], brought["label"], brought.get("confidence"), spacing)
