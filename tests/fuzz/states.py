"""Ways to spoil lists of cases, and what earlier runs wrote: name -> function of path and random numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz.files import FILE


def edited(change: Callable[[Any, str, random.Random], Any]) -> Callable:
    """Spoil a list of cases, in the section that is read."""

    def spoil(path: Path, rng: random.Random, section: str) -> None:
        content = change(json.loads(path.read_text()), section, rng)
        path.unlink()
        path.write_text(json.dumps(content))

    return spoil


def without_key(content, section, rng):
    del content[section][0]["label"]
    return content


def not_a_name(content, section, rng):
    content[section][0]["label"] = rng.choice([7, None, ["a.nii.gz"], True, {"file": "a"}, ""])
    return content


def not_a_case(content, section, rng):
    content[section][0] = rng.choice(["a.nii.gz", 5, None, []])
    return content


def not_a_list(content, section, rng):
    content[section] = rng.choice([{}, 3, "cases", None])
    return content


def no_case(content, section, rng):
    content[section] = []
    return content


def no_section(content, section, rng):
    del content[section]
    return content


def no_lists(content, section, rng):
    return rng.choice([[], 5, "text", None, [content]])


def elsewhere(content, section, rng):
    file = content[section][0]["label"]
    content[section][0]["label"] = rng.choice([f"/nowhere/{file}", f"../{file}", file + "x", f"~/{file}"])
    return content


def other_format(content, section, rng):
    content[section][0]["label"] = content[section][0]["label"].replace(
        ".nii.gz", rng.choice([".nrrd", ".mha", ".dcm"])
    )
    return content


def bad_weight(content, section, rng):
    content[section][0]["weight"] = rng.choice([-1, "heavy", None, [1], True, math.nan])
    return content


def bad_mapped(content, section, rng):
    content[section][0]["mapped_label"] = rng.choice(["yes", 1, [], 0.5])
    return content


LIST = {
    spoil.__name__: edited(spoil)
    for spoil in (without_key, not_a_name, not_a_case, not_a_list, no_case, no_section, no_lists, elsewhere)
}
LIST |= {spoil.__name__: edited(spoil) for spoil in (other_format, bad_weight, bad_mapped)}
LIST |= {name: lambda path, rng, section, spoil=FILE[name]: spoil(path, rng) for name in FILE if name != "cut_inside"}


def lost_key(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    del content[rng.choice(sorted(content))]
    path.unlink()
    path.write_text(json.dumps(content))


def other_value(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    content[rng.choice(sorted(content))] = rng.choice([None, "text", -1, [], {}, [0], {"a": "b"}])
    path.unlink()
    path.write_text(json.dumps(content))


def no_object(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.write_text(rng.choice(["[]", "3", "null", '"text"']))


def saved(change: Callable[[dict[str, Any], random.Random], Any]) -> Callable:
    """Spoil weights."""

    def spoil(path: Path, rng: random.Random) -> None:
        content = torch.load(path, weights_only=True)
        path.unlink()
        torch.save(change(content, rng), path)

    return spoil


def nan_weights(content, rng):
    name = rng.choice(sorted(key for key, value in content.items() if value.is_floating_point() and value.numel()))
    content[name] = torch.full_like(content[name], rng.choice([math.nan, math.inf]))
    return content


def lost_weights(content, rng):
    del content[rng.choice(sorted(content))]
    return content


def other_shape(content, rng):
    name = rng.choice(sorted(key for key, value in content.items() if value.ndim))
    content[name] = torch.cat([content[name], content[name]])
    return content


def no_weights(content, rng):
    return rng.choice([3, [], "weights", None, {"model": 1}, {}])


def within(content, rng):
    return {"state_dict": content}


def code(path: Path, rng: random.Random) -> None:
    """A pickle that would run something."""
    path.unlink()
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")


JSON_STATE = {name: FILE[name] for name in ("cut", "empty", "garbage", "text", "folder")} | {"no_object": no_object}
LEGAL_STATE = {"lost_key": lost_key, "other_value": other_value}
RESUME = {name: FILE[name] for name in ("cut", "empty", "garbage", "text", "folder")} | {"code": code}
WEIGHTS = {**RESUME, **{name: FILE[name] for name in ("dangling", "missing")}}
WEIGHTS |= {s.__name__: saved(s) for s in (nan_weights, lost_weights, other_shape, no_weights, within)}
