"""Options of a run, and values that they must not or may not have."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

from custom.runs.options import RULES
from fuzz.chains import RUNS, parser_of

BLOCKS = {"generating": ("motion", "edits", "gate"), "synthesizing": ("gate",), "measuring": ("limits",)}
"""What a run reads of these; others have them from the configs before, and make nothing of them."""
TABLES = {"contrast_sd_hu": 20, "components": 1, "handles": 0, "nominal_hu": 40, "thin": False, "keep": False}
TABLES |= {
    "touches": [6],
    "plausible_hu": [30, 220],
    "class_weight": 1.0,
    "pieces_kept": 1,
    "wall": True,
    "name": "x",
    "pool": "left",
}
NULLS = ("gate", "pool", "edits", "pieces_kept", "plausible_hu", "nominal_hu", "spacing_mm")
"""Last or first words of options for which null may have a meaning."""
UNBOUNDED = ("count", "retries", "max_epochs", "samples_per_epoch", "workers", "num_workers")
"""Which a run is right to take however long it will need."""


@functools.cache
def options_of(key: str) -> dict[str, Any]:
    """Options of a run and their defaults: those with a rule, of blocks, of a row of the anatomy, of the network."""
    run = RUNS[key]
    parser = parser_of(run)
    blocks = BLOCKS.get(run.run_id, ())
    found = {}
    for name in RULES:
        if name in parser and (name not in sum(BLOCKS.values(), ()) or name in blocks):
            found[name] = parser.get_parsed_content(name)
    for block in blocks:
        found |= {f"{block}#{key}": value for key, value in parser.config.get(block, {}).items()}
    found |= {f"anatomy#{k}#{column}": value for k in (1, 9) for column, value in TABLES.items()}
    return {name: value for name, value in found.items() if not str(value).startswith(("$", "@"))}


def wrong_kinds(default: Any) -> list[Any]:
    """What no option of this kind may be."""
    if isinstance(default, bool):
        return ["perhaps", 3, None, [True], {"a": 1}, 0.5]
    if isinstance(default, (int, float)):
        return ["many", math.nan, math.inf, [default], [default, default], {"a": 1}, True, None, "", "1,5"]
    if isinstance(default, (list, tuple)):
        return ["text", 7.5 + len(default), [*default[:-1], "x"], [*default[:-1], math.nan], {"a": 1}, None, True]
    if isinstance(default, str):
        return ["", 7, ["a"], None, {"a": 1}, True, "  ", 2.5]
    return [7, "text", None, [1], True]


def odd_values(default: Any) -> list[Any]:
    """What may be out of range for an option of this kind."""
    if isinstance(default, bool):
        return []
    if isinstance(default, (int, float)):
        return [-1, 0, -0.5, 1e30, 10**12, 0.3, 1.5]
    if isinstance(default, (list, tuple)):
        reversed_, longer = list(default[::-1]), [*default, *default[:1]]
        return [reversed_, default[:-1], [], longer, [0] * len(default), [-1] * len(default), [10**9] * len(default)]
    return ["elsewhere", "templates"]


def misspelt(name: str, rng: random.Random) -> str:
    """A letter of an option lost, doubled or swapped with the next."""
    k = rng.randrange(len(name) - 1)
    swapped = name[:k] + name[k + 1] + name[k] + name[k + 2 :]
    return rng.choice([name[:k] + name[k + 1 :], name[: k + 1] + name[k:], swapped])
