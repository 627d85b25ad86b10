"""Which mask is rendered from which template, and what is still to be made."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from custom.evaluation.records import OF_A_RECORD, read_record
from custom.runs.files import content_hash, file_hash
from custom.volumes.cases import check_files, check_names, mapped_entry, with_template, with_template_names
from custom.volumes.names import case_name, case_names
from custom.volumes.numbering import check_mapping
from custom.volumes.reading import read_labels

logger = logging.getLogger(__name__)

_GUIDED = ("template", "painted")
CHOICES = ("source", "nearest", "random", "all")


def _volumes(item: Mapping[str, Any], num_labels: int, label_mapping: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Volume of each label in ml; ids beyond the map are left out."""
    volume = read_labels(item, label_mapping)
    counts = np.bincount(volume.numpy().astype(np.int64).ravel().clip(0), minlength=num_labels)
    return counts[1:num_labels] * float(volume.pixdim.prod()) / 1000


def _agreeing_folders(template: Mapping[str, Any], source: str) -> int:
    """So many parts at the end of two paths are the same, file endings apart; 0 when the names are not."""
    first, second = (Path(path) for path in (template["label"], source))
    if case_name(str(first)) != case_name(str(second)):
        return 0
    pairs = list(zip(reversed(first.parent.parts), reversed(second.parent.parts), strict=False))
    return 1 + next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _of_source(mask: Mapping[str, Any], templates: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The template that a mask was made from: by its path, else, as data may have moved, by the end of that."""
    source = str(mask.get("source", ""))
    chosen = [t for t in templates if Path(t["label"]).resolve() == Path(source).resolve()]
    if not chosen:
        agreeing = [_agreeing_folders(template, source) for template in templates]
        chosen = [t for t, n in zip(templates, agreeing, strict=True) if n == max(agreeing) > 0]
    if len(chosen) != 1:
        raise ValueError(
            f"{mask['label']}: {len(chosen)} templates, not one, have the label {mask.get('source')} that it "
            "was made from; list it once, or choose templates by 'nearest' or 'random'"
        )
    return chosen[0]


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
        masks: items with `label`, and `source` (the label file that a mask was made from) for the choice "source";
            `mapped_label` where its ids are those of the model.
        templates: `{"image": file, "label": file}`, at least one; with `mapped_label` as well.
        choice: "source" takes the template that the mask was made from, "nearest" those with the most similar label
            volumes, "random" draws, "all" takes every template.
        images_per_mask: templates a mask; "source" has one, "all" takes them all.
        seed: of the draws, which depend on it and the name of the mask alone.
        num_labels: label ids 0 to num_labels - 1.
        label_mapping: "from" and "to" ids; others stay.
        mode: of rendering; only "template" and "painted" have a template to be judged against.

    Returns:
        `label`, `mask_name` (see :func:`custom.volumes.names.case_names`), `case`, `template_image`, `template_label`
        of every image, `mapped_label` and `mapped_template_label` where it is known.

    Raises:
        FileNotFoundError: naming all missing files.
        ValueError: on an unknown choice, too few templates, a mask without a template of its source, a mapping that
            cannot be meant, or a mask or template that is listed twice.
    """
    if choice not in CHOICES:
        raise ValueError(f"template_choice: must be one of {CHOICES}, got {choice!r}")
    if mode not in _GUIDED:
        raise ValueError(
            f"mode: a synthetic data set is made in mode 'template' or 'painted', got {mode!r}; render with "
            "inference.json"
        )
    if not templates:
        raise ValueError("templates: at least one image-mask pair is needed")
    if choice in ("nearest", "random") and not 1 <= images_per_mask <= len(templates):
        raise ValueError(f"images_per_mask: must be 1 to the {len(templates)} templates, got {images_per_mask}")
    check_files([*masks, *templates], "target masks and templates")
    check_mapping(label_mapping, num_labels)
    volumes = [_volumes(t, num_labels, label_mapping) for t in templates] if choice == "nearest" else []
    named: list[Mapping[str, Any]] = [*with_template_names(templates)]
    cases = []
    for mask, name in zip(masks, case_names([mask["label"] for mask in masks]), strict=True):
        if choice == "source":
            chosen = [_of_source(mask, named)]
        elif choice == "nearest":
            own = _volumes(mask, num_labels, label_mapping)
            distance = [float(np.abs(np.log1p(own) - np.log1p(v)).sum()) for v in volumes]
            chosen = [named[i] for i in np.argsort(distance, kind="stable")[:images_per_mask]]
        elif choice == "random":
            rng = np.random.default_rng(int(content_hash(f"{seed}:{name}".encode()), 16))
            chosen = [named[i] for i in rng.permutation(len(named))[:images_per_mask]]
        else:
            chosen = named
        case = {"label": mask["label"], "mask_name": name, "case": name, **mapped_entry(mask, mask["label"], "masks")}
        cases += [with_template(case, template) for template in chosen]
    check_names(cases, "masks and templates")
    return cases


def record_of(output_dir: str, case: Mapping[str, Any]) -> dict[str, Any] | None:
    """Record of a case whose mask and files are as they were when it was written; None if it has to be made (again)."""
    root, name = Path(output_dir), f"records/{case['case']}.json"
    if not (root / name).exists():
        return None
    try:
        content = read_record(root, name, OF_A_RECORD)
    except ValueError as error:
        logger.warning("%s is made again: %s", case["case"], error)
        return None
    if file_hash(case["label"]) != content["mask_hash"]:
        logger.warning("%s has changed since; %s is made again", case["label"], case["case"])
        return None
    return content


def is_whole(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether a case is complete and undamaged, see :func:`record_of`."""
    return record_of(output_dir, case) is not None
