"""The JSON lists of cases that stages exchange."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from custom.runs.options import is_number
from custom.volumes.headers import check_ending
from custom.volumes.names import case_name, case_names
from custom.volumes.numbering import is_mapped, mapped_key

logger = logging.getLogger(__name__)


class NoCaseError(ValueError):
    """No list has a case in a section."""


_FILE_KEYS = ("image", "label", "confidence", "template_image", "template_label")


def check_files(items: Sequence[Mapping[str, Any]], source: str) -> None:
    """Refuse a list that names files which do not exist, all of them at once.

    Raises:
        FileNotFoundError: naming `source` and every missing file.
    """
    files = [str(item[key]) for item in items for key in _FILE_KEYS if key in item]
    missing = sorted({file for file in files if not os.path.isfile(file)})
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} listed files do not exist: {', '.join(missing)}; correct their names, or put "
            "them there"
        )


def _refuse(item: Mapping[str, Any], key: str, rule: str, source: str) -> None:
    raise ValueError(f"{source}: {key} must be {rule}, got {item[key]!r} in {dict(item)}; leave out what there is not")


def _file(item: Mapping[str, Any], key: str, source: str) -> str:
    if not isinstance(item[key], str):
        _refuse(item, key, "the name of a file", source)
    try:
        check_ending(item[key])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return str(item[key])


def read_number(item: Mapping[str, Any], key: str, source: str) -> float:
    """Number of an entry, at least 0, or a refusal that names the list and the case."""
    if not is_number(item[key]) or item[key] < 0:
        _refuse(item, key, "a number, at least 0", source)
    return float(item[key])


def mapped_entry(item: Mapping[str, Any], label: str, source: str, key: str = "label") -> dict[str, bool]:
    """What a case says under `mapped_<key>` of a label: what its item states, or True where a stage has written it."""
    stated = item.get(mapped_key("label"))
    if not isinstance(stated, bool | None):
        _refuse(item, mapped_key("label"), "true or false", source)
    mapped = is_mapped(label, stated)
    return {mapped_key(key): mapped} if mapped or stated is not None else {}


def _names(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the cases by their label files; by their images where one label file belongs to several."""
    images: dict[str, set[str]] = {}
    for case in cases:
        images.setdefault(case["label"], set()).add(case.get("image", ""))
    return case_names([case["image"] if len(images[case["label"]]) > 1 else case["label"] for case in cases])


def _section(datalist: str, name: str) -> list[Mapping[str, Any]]:
    """Items of a list; none where there is no such section."""
    rule = "must be JSON with lists of cases, each a dictionary"
    try:
        content = json.loads(Path(datalist).read_text())
    except ValueError as error:  # of json, and of characters that are no text
        raise ValueError(f"{datalist}: {rule} ({error})") from error
    items = content.get(name, []) if isinstance(content, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{datalist}: {rule}; {name!r} is none")
    return items


def load_cases(
    datalists: Sequence[str] | str,
    section: Sequence[str] | str,
    keys: Sequence[str] = ("image", "label"),
    limit: int | None = None,
    extras: Sequence[str] = (),
    extra_files: Sequence[str] = (),
    check: bool = True,
) -> list[dict[str, Any]]:
    """Read cases from decathlon-style datalists; relative paths are relative to their datalist.

    Args:
        datalists: JSON files, read one after the other.
        section: list to read, for example "training", or several; a datalist without it adds nothing.
        keys: entries that every case must have, `label` among them; others are dropped, but for `weight` (sampling
            weight, 1 when absent).
        limit: at most so many cases of each list.
        extras: further entries to keep as they are, where a case has them.
        extra_files: further files to keep as absolute paths, where a case has them.
        check: whether to look for the files; false where :func:`check_files` looks for those of several lists at once.

    Returns:
        one dictionary a case: `keys` as absolute paths, `case` (name of its label file, see :func:`case_names`) and
        `weight`; `mapped_label` where a stage has written the label, so that its ids are not renumbered again.

    Raises:
        FileNotFoundError: when a datalist or a listed file is missing.
        ValueError: when a datalist is malformed, a case lacks a key, a file is no NIfTI, or no case is found.
    """
    cases = []
    lists, sections = ([names] if isinstance(names, str) else names for names in (datalists, section))
    for datalist, name in product(lists, sections):
        if not os.path.isfile(datalist):
            raise FileNotFoundError(f"{datalist}: datalist not found; set `dataset_dir` or `datalists` in the config")
        base = os.path.dirname(os.path.abspath(datalist))
        for item in _section(datalist, name)[:limit]:
            absent = [key for key in keys if key not in item]
            if absent:
                raise ValueError(f"{datalist}: a case of {name!r} has no {absent}; every case needs {list(keys)}")
            own = [*keys, *(key for key in extra_files if key in item)]
            files = {key: os.path.join(base, _file(item, key, datalist)) for key in own}
            more = {key: item[key] for key in extras if key in item}
            weight = read_number({"weight": 1.0, **item}, "weight", datalist)
            cases.append({**files, **more, **mapped_entry(item, files["label"], datalist), "weight": weight})
    if not cases:
        raise NoCaseError(f"{datalists}: no case in section {section!r}; check the section names")
    cases = [{**case, "case": name} for case, name in zip(cases, _names(cases), strict=True)]
    if not any(case["weight"] for case in cases):
        raise ValueError(f"{datalists}: weight is 0 for all cases of section {section!r}: none would ever be drawn")
    if check:
        check_files(cases, str(datalists))
    return cases


def validation_cases(
    datalists: Sequence[str] | str, section: Sequence[str] | str, *, interval: int, limit: int | None = None
) -> list[dict[str, Any]]:
    """Cases that a training validates on, whose files are looked for later; none where it validates never.

    Args:
        datalists, section, limit: of :func:`load_cases`.
        interval: epochs from one validation to the next (`val_interval`); 0 for none.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_cases`; a list without such a case is not taken for the wish to
            train without validation.
    """
    if interval == 0:
        logger.info("val_interval 0: training without validation, the last weights are kept")
        return []
    try:
        return load_cases(datalists, section, limit=limit, check=False)
    except NoCaseError as error:
        raise NoCaseError(f"{error}, or set `val_interval` 0 to train without validation") from error


def rendering_cases(masks: Sequence[str], templates: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Every mask with every template.

    Args:
        masks: target label maps.
        templates: `{"image": file, "label": file}` of each template; empty renders every mask once without.

    Returns:
        dictionaries with `label`, `case` and, with a template, `template_image` and `template_label`; `mapped_label`
        and `mapped_template_label` as in :func:`load_cases`. The case is `<mask>_from_<template>`, or `<mask>` without
        template.

    Raises:
        FileNotFoundError: naming all missing files.
        TypeError: when `masks` is no list of texts, or a template has no image and label.
        ValueError: when there is no mask, a file is no NIfTI, or a mask or template is listed twice.
    """
    _check_list(masks, "target_masks")
    for template in templates:
        if not isinstance(template, Mapping) or not all(isinstance(template.get(k), str) for k in ("image", "label")):
            raise TypeError(
                f"templates: must be a list of {{'image': FILE, 'label': FILE}}, got {template!r} in it; "
                "name the label map of each image"
            )
    if not masks:
        raise ValueError("masks: no target label map found; set `target_masks` (a list of files) in the config")
    cases: list[dict[str, Any]] = []
    for file in [*masks, *(str(template[key]) for template in templates for key in ("image", "label"))]:
        check_ending(file)
    given = with_template_names(templates)
    for mask, name in zip(masks, case_names(masks), strict=True):
        case = {"label": mask, "case": name, **mapped_entry({}, mask, "target_masks")}
        cases += [with_template(case, template) for template in given] or [case]
    check_names(cases, "masks and templates")
    check_files(cases, "target masks and templates")
    return cases


def with_template_names(templates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Templates with the names of their images as `name`, see :func:`case_names`."""
    names = case_names([template["image"] for template in templates])
    return [{**template, "name": name} for template, name in zip(templates, names, strict=True)]


def with_template(case: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """A case of a mask with a template of :func:`with_template_names`."""
    files = {"template_image": template["image"], "template_label": template["label"]}
    mapped = mapped_entry(template, template["label"], "templates", "template_label")
    return {**case, "case": f"{case['case']}_from_{template['name']}", **files, **mapped}


def segmentation_cases(images: Sequence[str], images_root: str | None = None) -> list[dict[str, str]]:
    """What to segment, and under which names below the output folder the results are written.

    Args:
        images: files; none gives no case.
        images_root: folder below which results keep the folders of their images; None takes the deepest of all images.

    Returns:
        dictionaries with `image`, an absolute path, and `case`, `<folders>/<image>_seg`, which leads out of no folder.

    Raises:
        FileNotFoundError: naming all missing files.
        TypeError: when `images` is no list of texts.
        ValueError: when an image is not below `images_root`, or two cases would have one name.
    """
    _check_list(images, "images")
    files = [_absolute(image) for image in images]  # as MONAI reads them: `~` is the home folder
    if not files:
        return []
    root = _absolute(images_root) if images_root else Path(os.path.commonpath([file.parent for file in files]))
    outside = [str(file) for file in files if not file.is_relative_to(root)]
    if outside:
        raise ValueError(
            f"images_root: must be a folder that all images lie below, got {root}, which {outside} do not; "
            "choose a folder above them, or leave it out"
        )
    names = [file.relative_to(root).with_name(f"{case_name(str(file))}_seg") for file in files]
    cases = [{"image": str(file), "case": str(name)} for file, name in zip(files, names, strict=True)]
    check_names(cases, "images")
    check_files(cases, "images")
    return cases


def _check_list(files: Sequence[str], option: str) -> None:
    if isinstance(files, str):
        raise TypeError(f"{option}: must be a list of files, got the text {files!r}; write ['{files}']")
    for file in files:
        if not isinstance(file, str):
            raise TypeError(
                f"{option}: must be a list of files, got {file!r} in it; write names of files, as './a.nii'"
            )


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def check_names(cases: Sequence[Mapping[str, Any]], what: str) -> None:
    """Refuse cases of one name, as a file listed twice gives: their results would overwrite each other.

    Raises:
        ValueError: naming `what` they come from and the names.
    """
    names = [case["case"] for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{what}: file names must differ, they give {repeated} more than once; rename them, and list each file once"
        )
