"""Layer 2: from target masks and templates to a synthetic data set whose every voxel has a confidence."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.transforms import LoadImage, Transform
from monai.utils import CommonKeys as Keys

from custom.checks import file_of
from custom.datalists import case_name, check_files
from custom.quality import Gate, examine, rejections
from custom.records import content_hash, replace_file, write_json
from custom.transforms import plain
from custom.uncertainty import EDGE_BINS_MM, confidence, edge_bins, sample_score, tau_table
from custom.writers import SaveVolumed

logger = logging.getLogger(__name__)

CHOICES = ("source", "nearest", "random", "all")
ACCEPTED, REJECTED = "", "rejected/"


def _volumes(path: str, num_labels: int) -> np.ndarray:
    """Volume of each label in ml; ids beyond the map are left out."""
    volume = LoadImage()(path)
    counts = np.bincount(volume.numpy().astype(np.int64).ravel().clip(0), minlength=num_labels)
    return counts[1:num_labels] * float(volume.pixdim.prod()) / 1000


def synthesis_cases(
    masks: Sequence[Mapping[str, Any]],
    templates: Sequence[Mapping[str, str]],
    *,
    choice: str,
    images_per_mask: int,
    seed: int,
    num_labels: int,
) -> list[dict[str, Any]]:
    """Which mask is rendered from which template.

    Args:
        masks: items with `label`, and `source` (the label file that a mask was made from) for the choice "source".
        templates: `{"image": file, "label": file}`, at least one.
        choice: "source" takes the template that the mask was made from, "nearest" those with the most similar label
            volumes, "random" draws, "all" takes every template.
        images_per_mask: templates a mask; "source" has one, "all" takes them all.
        seed: of the draws, which depend on it and the name of the mask alone.
        num_labels: label ids 0 to num_labels - 1.

    Returns:
        `label`, `case`, `template_image`, `template_label` of every image.

    Raises:
        FileNotFoundError: naming all missing files.
        ValueError: on an unknown choice, too few templates, a mask without a template of its source, or two cases of
            one name.
    """
    if choice not in CHOICES:
        raise ValueError(f"template_choice: must be one of {CHOICES}, got {choice!r}")
    if not templates:
        raise ValueError("templates: at least one image-mask pair is needed")
    if choice in ("nearest", "random") and not 1 <= images_per_mask <= len(templates):
        raise ValueError(f"images_per_mask: must be 1 to the {len(templates)} templates, got {images_per_mask}")
    check_files([*masks, *templates], "target masks and templates")
    volumes = [_volumes(t["label"], num_labels) for t in templates] if choice == "nearest" else []
    cases = []
    for mask in masks:
        name = case_name(mask["label"])
        if choice == "source":
            chosen = [t for t in templates if case_name(t["label"]) == case_name(mask.get("source", ""))]
            if not chosen:
                raise ValueError(
                    f"{mask['label']}: no template has the label {mask.get('source')} that it was made from; list it, "
                    "or choose templates by 'nearest' or 'random'"
                )
        elif choice == "nearest":
            own = _volumes(mask["label"], num_labels)
            distance = [float(np.abs(np.log1p(own) - np.log1p(v)).sum()) for v in volumes]
            chosen = [templates[i] for i in np.argsort(distance, kind="stable")[:images_per_mask]]
        elif choice == "random":
            rng = np.random.default_rng(int(content_hash(f"{seed}:{name}".encode()), 16))
            chosen = [templates[i] for i in rng.permutation(len(templates))[:images_per_mask]]
        else:
            chosen = list(templates)
        for template in chosen:
            case = {"label": mask["label"], "case": f"{name}_from_{case_name(template['image'])}"}
            cases.append(case | {"template_image": template["image"], "template_label": template["label"]})
    names = [case["case"] for case in cases]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"masks and templates: file names must differ, they give {repeated} more than once")
    return cases


def complete(output_dir: str, case: str) -> bool:
    """Whether a case has a record and all its files are as they were written."""
    record = Path(output_dir) / "records" / f"{case}.json"
    if not record.exists():
        return False
    for file, digest in json.loads(record.read_text())["files"].items():
        path = Path(output_dir) / file
        if not path.exists() or content_hash(path.read_bytes()) != digest:
            logger.warning("%s is missing or damaged and is made again", path)
            return False
    return True


def incomplete(
    cases: Sequence[dict[str, Any]], output_dir: str, *, shard: int = 0, shards: int = 1
) -> list[dict[str, Any]]:
    """Cases of one process that are still to be made, or have to be made again because a file was damaged.

    Args:
        cases: all of the run.
        output_dir: of the run, shared by all processes.
        shard, shards: number of the process, from 0, and of processes; each takes every `shards`-th case.
    """
    return [case for case in cases[shard::shards] if not complete(output_dir, case["case"])]


class SplitVarianced(Transform):
    """Split `pred` (2, H, W, D) into `pred`, the image, and `variance`, both (1, H, W, D)."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split one item."""
        return {**data, "pred": data["pred"][:1], "variance": data["pred"][1:]}


class Confidenced(Transform):
    """Add `confidence` (1, H, W, D) and `score` (HU) from `variance` and `label`.

    Args:
        table: JSON file of :class:`CalibrateConfidence`.
        weights: the model file that the table must have been made with.
        spacing_mm: of the model.
        method: how the variance was made, which the table must agree with.
        c_min: smallest confidence.

    Raises:
        FileNotFoundError: when there is no table.
        ValueError: when it is of other weights or another method.
    """

    def __init__(
        self, table: str, *, weights: str, spacing_mm: Sequence[float], method: str, c_min: float = 0.05
    ) -> None:
        path = Path(table)
        if not path.is_file():
            raise FileNotFoundError(f"{table}: no confidence table; run calibrate.json with these weights first")
        content = json.loads(path.read_text())
        wanted = {"weights": content_hash(Path(weights).read_bytes()), "method": method}
        for key, value in wanted.items():
            if content.get(key) != value:
                raise ValueError(
                    f"{table}: was made with {key} {content.get(key)}, not {value} of {weights}; calibrate anew"
                )
        self.tau = torch.tensor(content["tau_hu2"])
        self.spacing_mm, self.c_min = spacing_mm, c_min

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Judge one item."""
        label, variance = plain(data["label"])[0, 0].cpu(), plain(data["variance"])[0, 0].cpu()
        values = confidence(variance, label, edge_bins(label, self.spacing_mm), self.tau, c_min=self.c_min)
        kept = MetaTensor(values[None], meta=data["pred"].meta)
        return {**data, "confidence": kept, "score": sample_score(variance, label)}


class Gated(Transform):
    """Add `measures` of the image and `rejected`, the limits it breaks.

    Args:
        limits: by name, see `custom.quality.Gate`.
        thin_labels: ids of vessels.
    """

    def __init__(self, limits: Mapping[str, Any], *, thin_labels: Sequence[int]) -> None:
        self.gate, self.thin_labels = Gate.from_config(limits), list(thin_labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Judge one item, on the grid of the model."""
        measures = examine(
            plain(data["pred"])[0, 0].cpu().numpy(),
            plain(data["label"])[0, 0].cpu().round().long().numpy(),
            template_means=torch.as_tensor(data["statistics"])[:, 0].tolist(),
            template_image=plain(data["template_image"])[0, 0].cpu().numpy(),
            thin_labels=self.thin_labels,
        )
        return {**data, "measures": measures, "rejected": rejections(measures, data["score"], self.gate)}


class SaveSyntheticd(Transform):
    """Write image, confidence, label and last the record of a case; what the gate rejected goes to `rejected/`.

    Args:
        output_dir: of the run.
        cases: all of the run, as `synthesis_cases` gives them; records keep where an image came from.
        label_mapping: "from" and "to" ids, applied to the mask as it was to what the network saw.
    """

    def __init__(
        self, *, output_dir: str, cases: Sequence[Mapping[str, Any]], label_mapping: Mapping[str, Sequence[int]]
    ) -> None:
        self.root, self.mapping = Path(output_dir), label_mapping
        self.sources = {case["case"]: dict(case) for case in cases}

    def _mapped(self, ids: np.ndarray) -> np.ndarray:
        mapped = ids.copy()
        for old, new in zip(self.mapping["from"], self.mapping["to"], strict=True):
            mapped[ids == old] = new
        return mapped

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one item.

        Raises:
            OSError: naming the file that could not be written.
        """
        case, place = data["case"], REJECTED if data["rejected"] else ACCEPTED
        files = {"image": f"{place}images/{case}.nii.gz", "confidence": f"{place}confidence/{case}.nii.gz"}
        files["label"] = f"{place}labels/{case}.nii.gz"
        SaveVolumed("pred", output_dir=str(self.root / place / "images"))(data)
        SaveVolumed("confidence", output_dir=str(self.root / place / "confidence"), dtype="float32", digits=2)(data)
        source = self.sources[case]
        mask = LoadImage()(source["label"])
        label = nib.Nifti1Image(self._mapped(mask.numpy()).astype(np.uint8), mask.affine.numpy())
        replace_file(self.root / files["label"], partial(nib.save, label))
        content = {
            "case": case,
            "rejected": data["rejected"],
            "score_hu": data["score"],
            "measures": data["measures"],
            "mask": source["label"],
            "template": {"image": source["template_image"], "label": source["template_label"]},
            "paths": files,
            "files": {file: content_hash((self.root / file).read_bytes()) for file in files.values()},
        }
        write_json(self.root / "records" / f"{case}.json", content)
        return dict(data)


def write_synthetic_datalist(output_dir: str, provenance: Mapping[str, Any]) -> dict[str, int]:
    """Write `datalist.json` of all complete cases: "training" what the gate accepted, "rejected" the rest with reasons.

    Several processes write it one after the other, each when it is done, so the last one writes all.

    Returns:
        how many of each.
    """
    root = Path(output_dir)
    lists: dict[str, list[dict[str, Any]]] = {"training": [], "rejected": []}
    for path in sorted((root / "records").glob("*.json")):
        record = json.loads(path.read_text())
        item = {**record["paths"], "score_hu": record["score_hu"], "record": f"records/{path.name}"}
        if record["rejected"]:
            lists["rejected"].append(item | {"reasons": record["rejected"]})
        else:
            lists["training"].append(item)
    write_json(root / "datalist.json", {**lists, "provenance": dict(provenance)})
    counts = {name: len(items) for name, items in lists.items()}
    logger.info("%d synthetic cases, %d rejected: %s", counts["training"], counts["rejected"], root)
    return counts


class CalibrateConfidence:
    """Collect variances of rendered held-out masks and write the confidence table.

    Args:
        path: JSON file to write.
        weights: the model file, whose hash goes into the table.
        spacing_mm: of the model.
        num_labels: label ids 0 to num_labels - 1.
        method: how the variance was made.
        quantile: variance at which confidence is one half.
    """

    def __init__(
        self,
        path: str,
        *,
        weights: str,
        spacing_mm: Sequence[float],
        num_labels: int,
        method: str,
        quantile: float = 0.9,
    ) -> None:
        self.path, self.weights, self.spacing_mm = Path(path), weights, spacing_mm
        self.num_labels, self.method, self.quantile = num_labels, method, quantile
        self._cases: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._names: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose predictions are (B, 2, H, W, D)."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep variance, label and edge bins of each case."""
        variances, labels = engine.state.output[Keys.PRED][:, 1].cpu(), engine.state.batch["label"]  # type: ignore[index]
        for variance, volume in zip(variances, labels, strict=True):
            label = plain(volume)[0, 0].cpu()
            self._cases.append((variance, label, edge_bins(label, self.spacing_mm)))
            self._names.append(file_of(volume))

    def write(self, engine: Engine) -> None:
        """Write the table."""
        tau, count = tau_table(self._cases, num_labels=self.num_labels, quantile=self.quantile)
        content = {
            "tau_hu2": tau.tolist(),
            "voxels": count.tolist(),
            "edge_bins_mm": list(EDGE_BINS_MM),
            "quantile": self.quantile,
            "method": self.method,
            "weights": content_hash(Path(self.weights).read_bytes()),
            "masks": self._names,
        }
        write_json(self.path, content)
        logger.info("confidence table of %d cases: %s", len(self._cases), self.path)
