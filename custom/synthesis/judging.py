"""Cases of a synthetic data set judged: labels where the network drew them, vessels as they are written."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from custom.evaluation.gate import (
    ImageGate,
    VesselReference,
    examine_labels,
    examine_vessels,
    rejections,
    vessel_reference,
)
from custom.volumes.grids import as_batch
from custom.volumes.numbering import mapped_key
from custom.volumes.reading import LoadVolumesd, read_labels
from monai.transforms import Compose, EnsureChannelFirstd, Transform

__all__ = ["JudgeRenderingd", "template_of"]


def template_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """The template of a case of `synthesis_cases`, as an item of a datalist."""
    template = {"image": case["template_image"], "label": case["template_label"]}
    mapped = mapped_key("template_label")
    return template | ({mapped_key("label"): case[mapped]} if mapped in case else {})


def _values(volume: torch.Tensor) -> np.ndarray:
    values: np.ndarray = as_batch(volume)[0, 0].cpu().numpy()
    return values


class JudgeRenderingd(Transform):
    """Add `measures` of the image and `rejected`, the limits it breaks.

    Labels are measured in `drawn`, the structure on the grid of the model, against the aligned template. Vessels may
    blur away where the mask has finer voxels: they are measured in `pred`, brought back to the grid of the mask, with
    the mask of the user, against the template as its own files show it. What is measured of a template is kept for
    further cases.

    Args:
        limits: by name, see `custom.evaluation.gate.ImageGate`.
        thin_labels: ids of vessels.
        cases: all of the run, as `synthesis_cases` gives them.
        label_mapping: "from" and "to" ids, applied to files of the user as they were to what the network saw.
    """

    def __init__(
        self,
        limits: Mapping[str, Any],
        *,
        thin_labels: Sequence[int],
        cases: Sequence[Mapping[str, Any]],
        label_mapping: Mapping[str, Sequence[int]],
    ) -> None:
        self.gate, self.thin_labels = ImageGate.from_config(limits), list(thin_labels)
        self.label_mapping = label_mapping
        self.sources = {case["case"]: dict(case) for case in cases}
        self.read_image = Compose([LoadVolumesd("image"), EnsureChannelFirstd("image")])
        self.known: dict[tuple[str, str], VesselReference] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Judge one item."""
        source = self.sources[data["case"]]
        measures = examine_labels(
            _values(data["drawn"]),
            _values(data["label"]).round().astype(np.int64),
            template_statistics=torch.as_tensor(data["statistics"]).tolist(),
            template_image=_values(data["template_image"]),
            thin_labels=self.thin_labels,
        )
        template = self._reference(template_of(source))
        if "mean_change_hu" in data:  # its contrast was varied
            change = torch.as_tensor(data["mean_change_hu"])[self.thin_labels].nanmean()
            template = template._replace(mean_hu=template.mean_hu + float(change))
        mask = read_labels(source, self.label_mapping)
        measures |= examine_vessels(
            _values(data["pred"]),
            _values(mask),
            template=template,
            thin_labels=self.thin_labels,
            spacing_mm=mask.pixdim.tolist(),
        )
        return {**data, "measures": measures, "rejected": rejections(measures, data["score"], self.gate)}

    def _reference(self, template: Mapping[str, Any]) -> VesselReference:
        files = template["image"], template["label"]
        if files not in self.known:
            label = read_labels(template, self.label_mapping)
            image = _values(self.read_image({"image": template["image"]})["image"])
            options = {"thin_labels": self.thin_labels, "spacing_mm": label.pixdim.tolist()}
            self.known[files] = vessel_reference(image, _values(label), **options)
        return self.known[files]
