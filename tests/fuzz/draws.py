"""Draws, by a seed, one thing that goes wrong in one run."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from custom.runs.options import RULES
from fuzz.chains import RUNS, parser_of
from fuzz.files import IMAGE, LABEL, LEGAL, LEGAL_LABEL, other_grid, rewritten
from fuzz.options import NULLS, UNBOUNDED, misspelt, odd_values, options_of, wrong_kinds
from fuzz.states import JSON_STATE, LEGAL_STATE, LIST, RESUME, WEIGHTS

SEED = int(os.environ.get("STRUCTDIFF_FUZZ_SEED", "0"))


@dataclass(frozen=True)
class Case:
    """One thing gone wrong.

    Attributes:
        text: what, for a person.
        spoil: of the user's folder.
        names: by which the user knows the culprit; `~` is the folder.
        options: typed, over those of the run.
        in_file: options that stand in a config of the user's instead.
        sure: whether the run has to be refused.
    """

    run: str
    text: str
    names: tuple[str, ...]
    spoil: Callable[[Path], None] = lambda home: None
    options: Mapping[str, Any] = field(default_factory=dict)
    in_file: Mapping[str, Any] = field(default_factory=dict)
    sure: bool = True


def draw_volume(key: str, rng: random.Random, home: Path) -> Case:
    run, label = RUNS[key], rng.random() < 0.5 and RUNS[key].labels
    file = named(rng.choice(run.labels if label or not run.images else run.images), home)
    label = file.startswith(("data/labels", "masks", "set/labels"))
    doubtful = {**LEGAL, **(LEGAL_LABEL if label else {})}
    ways = {**(LABEL if label else IMAGE), **doubtful}
    if "confidence" in file:
        ways = {name: way for name, way in ways.items() if name not in ("byte_scale", "constant", "unit_scale")}
    if label and file.replace("labels", "images") in run.images:  # a mask alone may have any grid
        ways["other_grid"] = rewritten(other_grid)
    way = rng.choice(sorted(ways))
    seed = rng.random()
    return Case(
        key,
        f"{way} of {file}",
        (f"~/{file}",),
        lambda home: ways[way](home / file, random.Random(seed)),
        sure=way not in doubtful,
    )


def draw_list(key: str, rng: random.Random, home: Path) -> Case:
    file, section = rng.choice(sorted(RUNS[key].lists.items()))
    way = rng.choice(sorted(LIST))
    seed = rng.random()
    names = {"elsewhere": ["datalists"]}  # trainings look for files of all lists at once
    if key == "measuring":  # two cases of other sections are too few
        names |= dict.fromkeys(("no_case", "no_section"), ["held_out_datalists"])
    return Case(
        key,
        f"{way} in {section!r} of {file}",
        (f"~/{file}", *names.get(way, ())),
        lambda home: LIST[way](home / file, random.Random(seed), section),
    )


def draw_state(key: str, rng: random.Random, home: Path) -> Case:
    file, options = rng.choice(sorted(RUNS[key].states.items(), key=lambda item: item[0]))
    file = named(file, home)
    doubtful = LEGAL_STATE if file.endswith(".json") else {"damaged": LEGAL["damaged"]}
    ways = JSON_STATE if file.endswith(".json") else RESUME if "resume" in file else WEIGHTS
    ways = {**ways, **doubtful}
    way = rng.choice(sorted(ways))
    seed = rng.random()
    return Case(
        key,
        f"{way} of {file}",
        (f"~/{file}", *["model.pt#ckpt_dir"] * (file == "models/model.pt")),  # a table knows others by their hash
        lambda home: ways[way](home / file, random.Random(seed)),
        options=options,
        sure=way not in doubtful,
    )


def draw_option(key: str, rng: random.Random, home: Path) -> Case:
    defaults = options_of(key)
    while True:
        name = rng.choice(sorted(defaults))
        sure = rng.random() < 0.6
        pool = wrong_kinds(defaults[name]) if sure else odd_values(defaults[name])
        value = rng.choice(pool or [None])
        first, last = name.split("#")[0], name.split("#")[-1]
        if name in RULES and (RULES[name].holds(value) or RULES[name].holds(str(value))):
            continue
        if value is None and {first, last} & {*NULLS} or last in UNBOUNDED and name not in RULES:
            continue
        sure = sure or name in RULES
        typed = rng.random() < 0.5
        if typed and isinstance(value, str) and name not in RULES and not sure:
            continue
        break
    where = {"options": {name: value}} if typed else {"in_file": {name: value}}
    names = (name, *(f"{label}#{last}" for label in ("LV myocardium", "coronary arteries") if first == "anatomy"))
    text = f"{'typed' if typed else 'in a file'} {name} {value!r}"
    return Case(key, text, names, sure=sure, **where)


def draw_typo(key: str, rng: random.Random, home: Path) -> Case:
    known = options_of(key)
    while True:
        first, _, last = rng.choice(sorted(known)).rpartition("#")
        name = f"{first}#{misspelt(last, rng)}".lstrip("#")  # a block that is not there is refused by MONAI itself
        if name not in {*known, *parser_of(RUNS[key]).config}:
            break
    return Case(key, f"misspelt {name}", (name,), options={name: 3})


def draw_place(key: str, rng: random.Random, home: Path) -> Case:
    reads = {"ckpt_dir": "model.pt"} if any("model.pt" in state for state in RUNS[key].states) else {}
    given = RUNS[key].options
    places = [("output_dir", value) for value in ("~/data/datalist.json", "~/data/datalist.json/out", "~/" + "x" * 300)]
    if key in ("reporting", "measuring"):
        places = [("output_dir", value) for value in ("~/gone", "~/data")]
    if "ckpt_dir" in given and (reads or "training" in key):
        places += [("ckpt_dir", value) for value in ("~/data/datalist.json", *["~/gone"] * bool(reads))]
    lists = [n for n in ("dataset_dir", "template_datalist", "mask_datalist", "synthetic_datalists") if n in given]
    if key == "measuring":  # it reads no masks beside the set
        lists.remove("mask_datalist")
    if key != "reporting":
        places += [(name, value) for name in lists for value in ("~/gone", "~/data/labels", "~/data/datalist.json/x")]
    places += [("images", [value]) for value in ("~/gone.nii.gz", "~/data") if "images" in given]
    places += [("target_masks", [value]) for value in ("~/gone.nii.gz", "~/data") if "target_masks" in given]
    name, value = rng.choice(places)
    typed = rng.random() < 0.5
    names = (name, value if isinstance(value, str) else value[0])
    where = {"options": {name: value}} if typed else {"in_file": {name: value}}
    return Case(key, f"{name} {str(value)[:40]!r}", names, **where)


DRAWS = {draw_volume: 6, draw_list: 2, draw_state: 2, draw_option: 5, draw_typo: 1, draw_place: 1}


def named(file: str, home: Path) -> str:
    """A file of the set by the entry of its first case."""
    if "{" not in file:
        return file
    listed = json.loads((home / "set/datalist.json").read_text())
    return file.format(**listed["training"][0])


def draw(index: int, keys: list[str], home: Path) -> Case:
    """The case of a number: runs take turns."""
    rng = random.Random(f"{SEED}:{index}")
    key = keys[index % len(keys)]
    run = RUNS[key]
    possible = {draw_volume: run.images, draw_list: run.lists, draw_state: run.states}
    draws = {way: weight for way, weight in DRAWS.items() if possible.get(way, True)}
    return rng.choices(list(draws), list(draws.values()))[0](key, rng, home)
