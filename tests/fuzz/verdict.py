"""What the end of a run must be: an error as a user needs it, or files that are whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from custom.checks import cause_of


def contents(folder: Path) -> dict[str, Any]:
    """What is below a folder: files with size and time, links with their target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = (state.st_size, state.st_mtime_ns)
    return found


REMEDY = re.compile(
    r"\b(must|needs|choose|set|use|point|convert|export|correct|copy|calibrate|leave out|rename|delete|move|repeat"
    r"|resample|run `|write|make|bring back|replace|apply|split|train|lower|relax|map or drop|draw|check|for example"
    r"|did you mean|there are)\b"
)
INTERNALS = re.compile(
    r"Config(Expression|Component|Item)|_target_|has no attribute|NoneType|unexpected keyword|positional argument"
    r"|not supported between|unsupported operand|<(class|function|lambda)|custom\.[a-z]+\.|Tensor|tensor\(|\bc_min\b"
    r"|num_steps|timesteps|(Key|Index|Type|Attribute|Assertion|Unbound\w+|ZeroDivision|Overflow|Recursion|Value)Error"
    r"|must be real number|object is not|not iterable|Traceback|expected str|transform <"
)


OWN = re.compile(r"/\.\w[\w.]*\.lock$|/out/(generation|synthesis|rendering)\.json$")
"""What a run says of itself before it makes anything: who is at work, and with which options; others take it over."""


def assert_clear(error: BaseException, names: tuple[str, ...], before: Mapping, after: Mapping) -> None:
    """An error as a user needs it; see the head of tests/bundles/test_fuzz.py.

    Args:
        error: that ended the run.
        names: one of them is what the user knows the culprit by; all words of it stand in the message.
        before, after: contents of the user's folder.
    """
    cause = str(error) if isinstance(error, SystemExit) else cause_of(error)
    assert not isinstance(error, SystemExit) or cause not in ("", "0", "None", "2"), "ended without a word"
    assert any(all(word in cause for word in name.split("#")) for name in names), f"does not name {names}: {cause}"
    assert REMEDY.search(cause), f"does not say what would be right: {cause}"
    assert not INTERNALS.search(cause), f"speaks of internals: {cause}"
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path) and not OWN.search(path)}
    assert not changed, f"left or changed {sorted(changed)}: {cause}"
    for path in after.keys() - before.keys():
        assert not path.endswith(".json") or json.loads(Path(path).read_text()), f"half of {path}: {cause}"


def assert_whole(folder: Path) -> None:
    """All that a finished run has written can be read, and no part of anything is left."""
    for path in folder.rglob("*"):
        assert not path.name.startswith((".part_", ".mlflow_")), path
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=pytest.fail)
        elif path.name.endswith(".nii.gz"):
            values = np.asarray(nib.load(path).dataobj)
            assert np.isfinite(values).all(), path
            assert values.min() < values.max(), path
