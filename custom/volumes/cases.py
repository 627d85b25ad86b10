"""The JSON lists of cases that stages exchange."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist

_FILE_KEYS = ("image", "label", "confidence", "template_image", "template_label")


def check_files(items: Sequence[Mapping[str, Any]], source: str) -> None:
    """Refuse a list that names files which do not exist, all of them at once.

    Raises:
        FileNotFoundError: naming `source` and every missing file.
    """
    files = [str(item[key]) for item in items for key in _FILE_KEYS if key in item]
    missing = sorted({file for file in files if not os.path.isfile(file)})
    if missing:
        raise FileNotFoundError(f"{source}: {len(missing)} listed files do not exist: {', '.join(missing)}")


def case_name(path: str) -> str:
    """File name without folder and NIfTI ending."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def _refuse(item: Mapping[str, Any], key: str, rule: str, source: str) -> None:
    raise ValueError(f"{source}: {key} must be {rule}, got {item[key]!r} in {dict(item)}; leave out what there is not")


def _file(item: Mapping[str, Any], key: str, source: str) -> str:
    if not isinstance(item[key], str):
        _refuse(item, key, "the name of a file", source)
    return str(item[key])


def read_number(item: Mapping[str, Any], key: str, source: str) -> float:
    """Number of an entry, at least 0, or a refusal that names the list and the case."""
    if not isinstance(item[key], int | float) or isinstance(item[key], bool) or not item[key] >= 0:
        _refuse(item, key, "a number, at least 0", source)
    return float(item[key])


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
        keys: entries that every case must have; others are dropped, but for `weight` (sampling weight, 1 when absent).
        limit: at most so many cases of each list.
        extras: further entries to keep as they are, where a case has them.
        extra_files: further files to keep as absolute paths, where a case has them.
        check: whether to look for the files; false where :func:`check_files` looks for those of several lists at once.

    Returns:
        one dictionary a case: `keys` as absolute paths, `case` (name of its label file) and `weight`.

    Raises:
        FileNotFoundError: when a datalist or a listed file is missing.
        ValueError: when a datalist is malformed, a case lacks a key, or no case is found.
    """
    cases = []
    lists, sections = ([names] if isinstance(names, str) else names for names in (datalists, section))
    for datalist, name in product(lists, sections):
        if not os.path.isfile(datalist):
            raise FileNotFoundError(f"{datalist}: datalist not found; set `dataset_dir` or `datalists` in the config")
        base = os.path.dirname(os.path.abspath(datalist))
        try:
            items = load_decathlon_datalist(datalist, data_list_key=name, base_dir=base)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"{datalist}: must be JSON with lists of cases, each a dictionary ({error})") from error
        except (ValueError, IndexError):  # MONAI: no such section; an empty "test"
            items = []
        for item in items[:limit]:
            absent = [key for key in keys if key not in item]
            if absent:
                raise ValueError(f"{datalist}: a case of {name!r} has no {absent}; every case needs {list(keys)}")
            own = [*keys, *(key for key in extra_files if key in item)]
            files = {key: os.path.join(base, _file(item, key, datalist)) for key in own}
            more = {key: item[key] for key in extras if key in item}
            weight = read_number({"weight": 1.0, **item}, "weight", datalist)
            cases.append({**files, **more, "case": case_name(item["label"]), "weight": weight})
    if not cases:
        raise ValueError(f"{datalists}: no case in section {section!r}; check the section names")
    if not any(case["weight"] for case in cases):
        raise ValueError(f"{datalists}: weight is 0 for all cases of section {section!r}: none would ever be drawn")
    if check:
        check_files(cases, str(datalists))
    return cases


def rendering_cases(masks: Sequence[str], templates: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Every mask with every template.

    Args:
        masks: target label maps.
        templates: `{"image": file, "label": file}` of each template; empty renders every mask once without.

    Returns:
        dictionaries with `label`, `case` and, with a template, `template_image` and `template_label`. The case is
        `<mask>_from_<template>`, or `<mask>` without template.

    Raises:
        FileNotFoundError: naming all missing files.
        TypeError: when `masks` is one text instead of a list.
        ValueError: when there is no mask, or two cases would have one name.
    """
    if isinstance(masks, str):
        raise TypeError(f"target_masks: must be a list of files, got the text {masks!r}; write ['{masks}']")
    if not masks:
        raise ValueError("masks: no target label map found; set `target_masks` (a list of files) in the config")
    cases: list[dict[str, Any]] = []
    for mask in masks:
        for template in templates or [None]:  # type: ignore[list-item]
            case = {"label": mask, "case": case_name(mask)}
            if template is not None:
                case |= {"template_image": template["image"], "template_label": template["label"]}
                case["case"] += f"_from_{case_name(template['image'])}"
            cases.append(case)
    check_names(cases, "masks and templates")
    check_files(cases, "target masks and templates")
    return cases


def check_names(cases: Sequence[Mapping[str, Any]], what: str) -> None:
    """Refuse cases of one name: their results would overwrite each other.

    Raises:
        ValueError: naming `what` they come from and the names.
    """
    names = [case["case"] for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what}: file names must differ, they give {repeated} more than once; rename them")


def has_volume(case: Mapping[str, Any], output_dir: str) -> bool:
    """Whether `output_dir/<case>.nii.gz` exists; results appear there only when complete."""
    return os.path.isfile(os.path.join(output_dir, f"{case['case']}.nii.gz"))


def unfinished(
    cases: Sequence[dict[str, Any]],
    output_dir: str,
    *,
    done: Callable[[Mapping[str, Any], str], bool] = has_volume,
    shard: int = 0,
    shards: int = 1,
) -> list[dict[str, Any]]:
    """Cases that are still to be made, or have to be made again.

    Args:
        cases: all of the run.
        output_dir: of the run, shared by all processes.
        done: case and folder -> whether its results are there.
        shard, shards: number of the process, from 0, and of processes; each takes every `shards`-th case.

    Raises:
        ValueError: when there is no such shard.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard: must be 0 to {shards - 1} of {shards} shards, got {shard}")
    return [case for case in cases[shard::shards] if not done(case, output_dir)]
