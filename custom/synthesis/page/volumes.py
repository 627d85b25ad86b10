"""Cases of a set and their templates as the report shows them: upright, cropped to the labels, with their spacing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
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

__all__ = ["Case", "SetVolumes", "cropped", "resampled"]

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
    """Cases of a set and their templates, read when they are asked for.

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
        self._read_template = lru_cache(maxsize=2)(self._template)

    def synthetic(self, record: Record) -> Case:
        """The case itself.

        Raises:
            FileNotFoundError, ValueError: naming a file that is not one volume.
        """
        files = (self.root / record["paths"][key] for key in ("image", "label", "confidence"))
        image, label, confidence = (turned(read_one(file)) for file in files)
        return Case(image[0].numpy(), label[0].numpy(), confidence[0].numpy(), spacing_of(image))

    def template(self, record: Record) -> Case:
        """What a case was made after, its label map in the ids of the model; errors as of `synthetic`."""
        return self._read_template(_files(record))

    def template_name(self, record: Record) -> str:
        """Name of that."""
        return self.names[_files(record)]

    def _template(self, files: tuple[str, str]) -> Case:
        image = turned(read_one(files[0]))
        label = turned(read_labels(self.templates[files], self.mapping))
        return Case(image[0].numpy(), label[0].numpy(), None, spacing_of(image))


def _files(record: Record) -> tuple[str, str]:
    return record["template"]["image"], record["template"]["label"]


def cropped(case: Case, margin_mm: float) -> Case:
    """A case cut to a box around all its labels; the whole case when it has none."""
    if not (case.label > 0).any():
        return case
    margins = [round(margin_mm / edge) for edge in case.spacing_mm]
    h, w, d = grown_box(bounding_box(case.label > 0), margins)
    confidence = None if case.confidence is None else case.confidence[h, w, d]
    return Case(case.image[h, w, d], case.label[h, w, d], confidence, case.spacing_mm)


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
