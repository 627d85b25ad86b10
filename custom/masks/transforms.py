"""Label maps prepared and generated, as dictionary transforms."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom.geometry.deformation import identity_coordinates
from custom.masks.cases import IMAGES, MASKS, PREPARED, RECORDS
from custom.masks.gate import MaskGate
from custom.masks.generator import Generated, MaskGenerator, NotAcceptedError
from custom.masks.motion import Edits, Motion, from_options
from custom.masks.preparation import LabelMap, prepare_label_map
from custom.masks.reference import Neighbour, Reference, register_neighbour
from custom.runs.files import content_hash, write_json
from custom.runs.memory import warn_of_memory
from custom.runs.weights import last_line, save_atomically
from custom.volumes.anatomy import Label
from custom.volumes.cases import case_name
from custom.volumes.grids import as_batch, sample_cubic
from custom.volumes.reading import LoadVolumesd, file_of
from custom.volumes.writing import SaveVolumed
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, Orientation, ResampleToMatch, Spacing, Transform
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

_BYTES_A_VOXEL = 200  # and process, to make a mask: its distances, and velocities while they are composed


class PrepareMaskd(Transform):
    """Bring `label` (1, H, W, D) towards its intended topology and write what changed as `prepared/<case>.json`.

    Args:
        structures: label id -> what it is meant to be.
        smoothing_mm: see `custom.masks.preparation.prepare_label_map`.
        output_dir: of the run.
    """

    def __init__(self, structures: Mapping[int, Label], *, smoothing_mm: float, output_dir: str) -> None:
        self.structures, self.smoothing_mm = dict(structures), smoothing_mm
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare one item.

        Raises:
            ValueError: naming the file and the label that cannot be prepared.
        """
        label = data["label"]
        try:
            prepared, report = prepare_label_map(
                label_map_of(label), self.structures, spacing_mm=label.pixdim.tolist(), smoothing_mm=self.smoothing_mm
            )
        except ValueError as error:
            raise ValueError(f"{file_of(label)}: {error}") from error
        absent = [f"{k} ({s.name})" for k, s in self.structures.items() if k not in report]
        if absent:
            logger.warning("%s has no label %s; masks made from it will have none, too", file_of(label), absent)
        content = {"source": file_of(label), "absent": absent, "labels": {str(k): row for k, row in report.items()}}
        write_json(self.output_dir / PREPARED / f"{data['case']}.json", content)
        return {**data, "label": MetaTensor(torch.from_numpy(prepared)[None], meta=label.meta)}


def label_map_of(volume: torch.Tensor) -> LabelMap:
    """(1, H, W, D) -> (H, W, D) uint8."""
    return np.asarray(volume[0]).round().astype(np.uint8)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads differ in their last digits; a result must not depend on the number of processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class GenerateMaskd(Transform):
    """Replace `label`, a prepared reference in RAS, by a new label map; adds `record`, what was drawn and measured.

    A rejected item keeps its `label` and has `record["accepted"]` False.

    Args:
        structures: label id -> what it is meant to be.
        seed: of the run; a mask depends on it, its `index` and the content of its source and neighbours alone.
        motion, edits: how far to move, how to change vessels, by name: `Motion` and `Edits` of the generator.
        gate: limits of acceptance by name, see `custom.masks.gate.MaskGate`.
        cache_dir: registrations are kept here, by the content of both label maps.
        with_image: also deform `image`, the file of the source's image; adds it as `image`.

    Raises:
        ValueError: on an unknown limit or option, and on a negative seed.
    """

    def __init__(
        self,
        structures: Mapping[int, Label],
        *,
        seed: int,
        motion: Mapping[str, Any],
        edits: Mapping[str, Any],
        gate: Mapping[str, Any],
        cache_dir: str,
        with_image: bool = False,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.structures, self.seed, self.motion = dict(structures), seed, from_options(Motion, "motion", motion)
        self.edits = from_options(Edits, "edits", edits)
        self.gate, self.cache_dir, self.with_image = MaskGate.from_config(gate), Path(cache_dir), with_image
        self.orient = Compose([EnsureChannelFirst(), Orientation(axcodes="RAS", labels=None)])
        self._source: tuple[str, MaskGenerator] | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make the mask of one item."""
        item = dict(data)
        with _one_thread():
            generator = self._generator(item)
            try:
                made = generator((self.seed, item["index"]))
            except NotAcceptedError as error:
                logger.error("%s: %s", item["case"], error)
                item["record"] = {"accepted": False, "reason": str(error)}
                return item
            if self.with_image:
                item["image"] = self._deformed_image(item, made)
        item["label"] = MetaTensor(torch.from_numpy(made.label_map)[None], meta=item["label"].meta)
        neighbours = [case_name(path) for path in item["neighbours"]]
        item["record"] = {"accepted": True, "source": item["source"], "neighbours": neighbours, **made.record}
        return item

    def _generator(self, item: Mapping[Hashable, Any]) -> MaskGenerator:
        """Generator of the item's source; the one last used is kept, items of one source follow one another."""
        name = file_of(item["label"])
        if self._source is None or self._source[0] != name:
            label, worker = item["label"], get_worker_info()
            warn_of_memory(
                (1 if worker is None else worker.num_workers) * label.numel() * _BYTES_A_VOXEL,
                'set `spacing_mm` to what the images need (--spacing_mm "[0.8,0.8,0.8]"), or use fewer --workers',
            )
            try:
                reference = Reference(label_map_of(label), self.structures, spacing_mm=label.pixdim.tolist())
                neighbours = [self._neighbour(reference, label, path) for path in item["neighbours"]]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            generator = MaskGenerator(reference, neighbours, motion=self.motion, edits=self.edits, gate=self.gate)
            self._source = (name, generator)
        return self._source[1]

    def _neighbour(self, reference: Reference, label: MetaTensor, path: str) -> Neighbour:
        """Another prepared reference on the source's spacing, registered or read from the cache."""
        volume = self.orient(LoadVolumesd("label")({"label": path})["label"])
        if not torch.allclose(volume.pixdim, label.pixdim, atol=1e-3):
            logger.info("%s is resampled from %s to %s mm", path, volume.pixdim.tolist(), label.pixdim.tolist())
            volume = Spacing(pixdim=label.pixdim.tolist(), mode="nearest")(volume)
        other = label_map_of(volume)
        parts = [np.ascontiguousarray(m).tobytes() + str(m.shape).encode() for m in (reference.label_map, other)]
        key = content_hash(*parts, str(reference.spacing_mm).encode(), str(reference.walls).encode())
        file = self.cache_dir / f"{key}.pt"
        if file.exists():
            try:
                kept = torch.load(file, weights_only=True)
                return Neighbour(kept["label_map"].numpy(), kept["weights"])
            except Exception as error:  # what is no file of torch makes it raise errors of any kind
                logger.warning("%s: is damaged (%s); the registration is made again", file, last_line(error))
        neighbour = register_neighbour(reference.label_map, other, self.structures, reference.spacing_mm)
        content = {"label_map": torch.from_numpy(neighbour.label_map), "weights": neighbour.weights}
        save_atomically(content, file)
        return neighbour

    def _deformed_image(self, item: Mapping[Hashable, Any], made: Generated) -> MetaTensor:
        image = self.orient(LoadVolumesd("image")({"image": item["image"]})["image"])
        if image.shape != item["label"].shape or not torch.allclose(image.affine, item["label"].affine, atol=1e-3):
            image = ResampleToMatch(mode="bilinear", padding_mode="border")(image, item["label"])
        where = identity_coordinates(made.displacement.shape[2:]) + made.displacement
        return MetaTensor(sample_cubic(as_batch(image), where)[0], meta=item["label"].meta)


class SaveMaskd(Transform):
    """Write an accepted `label` and its `image`, if any, then `record`: a case with a record is complete.

    `masks/<case>.nii.gz`, `images/<case>.nii.gz`, `records/<case>.json`, axes as in the source's file.

    Args:
        output_dir: of the run.
        with_image: whether items carry an image.
    """

    def __init__(self, *, output_dir: str, with_image: bool = False) -> None:
        root = self.output_dir = Path(output_dir)
        self.writers = [SaveVolumed("label", output_dir=str(root / MASKS), dtype="uint8", original_axes=True)]
        if with_image:
            self.writers.append(SaveVolumed("image", output_dir=str(root / IMAGES), original_axes=True))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one item.

        Raises:
            OSError: naming the file that could not be written.
        """
        for write in self.writers if data["record"]["accepted"] else []:
            write(data)
        write_json(self.output_dir / RECORDS / f"{data['case']}.json", {"case": data["case"], **data["record"]})
        return dict(data)
