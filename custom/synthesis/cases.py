"""Which mask is rendered from which template, and what is still to be made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import LoadImage, MapLabelValue

from custom.runs.files import content_hash, file_hash
from custom.volumes.cases import case_name, check_files, check_names

logger = logging.getLogger(__name__)

CHOICES = ("source", "nearest", "random", "all")


def renumbered(ids: np.ndarray, label_mapping: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Label ids with "from" replaced by "to", int64; others stay."""
    if not label_mapping["from"]:  # which MONAI refuses
        return ids.astype(np.int64)
    return np.asarray(MapLabelValue(label_mapping["from"], label_mapping["to"], dtype=np.int64)(ids))


def _volumes(path: str, num_labels: int, label_mapping: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Volume of each label in ml; ids beyond the map are left out."""
    volume = LoadImage()(path)
    ids = renumbered(volume.numpy(), label_mapping)
    counts = np.bincount(ids.ravel().clip(0), minlength=num_labels)
    return counts[1:num_labels] * float(volume.pixdim.prod()) / 1000


def synthesis_cases(
    masks: Sequence[Mapping[str, Any]],
    templates: Sequence[Mapping[str, str]],
    *,
    choice: str,
    images_per_mask: int,
    seed: int,
    num_labels: int,
    label_mapping: Mapping[str, Sequence[int]],
    mode: str = "template",
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
        label_mapping: "from" and "to" ids; others stay.
        mode: of rendering; only "template" can be judged against a template.

    Returns:
        `label`, `case`, `template_image`, `template_label` of every image.

    Raises:
        FileNotFoundError: naming all missing files.
        ValueError: on an unknown choice, too few templates, a mask without a template of its source, or two cases of
            one name.
    """
    if choice not in CHOICES:
        raise ValueError(f"template_choice: must be one of {CHOICES}, got {choice!r}")
    if mode != "template":
        raise ValueError(
            f"mode: a synthetic data set is made in mode 'template', got {mode!r}; render with inference.json"
        )
    if not templates:
        raise ValueError("templates: at least one image-mask pair is needed")
    if choice in ("nearest", "random") and not 1 <= images_per_mask <= len(templates):
        raise ValueError(f"images_per_mask: must be 1 to the {len(templates)} templates, got {images_per_mask}")
    check_files([*masks, *templates], "target masks and templates")
    volumes = [_volumes(t["label"], num_labels, label_mapping) for t in templates] if choice == "nearest" else []
    cases = []
    for mask in masks:
        name = case_name(mask["label"])
        if choice == "source":
            source = str(mask.get("source", ""))
            chosen = [t for t in templates if Path(t["label"]).resolve() == Path(source).resolve()]
            chosen = chosen or [t for t in templates if case_name(t["label"]) == case_name(source)]
            if len(chosen) != 1:
                raise ValueError(
                    f"{mask['label']}: {len(chosen)} templates, not one, have the label {mask.get('source')} that it "
                    "was made from; list it once, or choose templates by 'nearest' or 'random'"
                )
        elif choice == "nearest":
            own = _volumes(mask["label"], num_labels, label_mapping)
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
    check_names(cases, "masks and templates")
    return cases


def record_of(output_dir: str, case: Mapping[str, Any]) -> dict[str, Any] | None:
    """Record of a case whose mask and files are as they were when it was written; None if it has to be made (again)."""
    root = Path(output_dir)
    record = root / "records" / f"{case['case']}.json"
    if not record.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(record.read_text())
    except json.JSONDecodeError:
        logger.warning("%s is damaged; the case is made again", record)
        return None
    if file_hash(case["label"]) != content["mask_hash"]:
        logger.warning("%s has changed since; %s is made again", case["label"], case["case"])
        return None
    for file, digest in content["files"].items():
        if not (root / file).exists() or file_hash(str(root / file)) != digest:
            logger.warning("%s is missing or damaged and is made again", root / file)
            return None
    return content


def is_whole(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether a case is complete and undamaged, see :func:`record_of`."""
    return record_of(output_dir, case) is not None
