"""Folders that hold the results of one run: whose they are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from custom.runs.command_line import configured
from custom.runs.files import (
    content_hash,
    differences,
    file_hashes,
    plain_values,
    read_json,
    remove_leftovers,
    write_json,
)
from custom.runs.locks import is_at_work, lock_folder, unlock_folder
from ignite.engine import Engine

logger = logging.getLogger(__name__)


def claim_folder(
    output_dir: str, *, name: str, provenance: Mapping[str, Any], intermediate: Sequence[str] | None = None
) -> dict[str, Any]:
    """Makes a folder the place of one run: writes what the run is, or checks that it is the same one going on.

    A run that ended before it made anything can leave the folder to the next one, whatever its options: else the remedy
    that an error names could not be followed.

    Args:
        output_dir: a new or empty folder, or one that the same run began.
        name: of the JSON file in it that says what the run is.
        provenance: what determines the results; dataclasses are written as dictionaries.
        intermediate: names in the folder that are no results; another run takes over a folder that holds nothing else,
            and removes them. None: it never does.

    Returns:
        The provenance as written, with "config_hash" of all of it but :data:`CONFIG`.

    Raises:
        ValueError: if the folder belongs to another run (naming what differs) or holds other files.
    """
    root = Path(output_dir)
    record, wanted = root / name, plain_values(provenance)
    hashed = {key: value for key, value in wanted.items() if key != CONFIG}
    wanted["config_hash"] = content_hash(json.dumps(hashed, sort_keys=True).encode())
    if record.exists():
        found = read_json(record, f"choose another output_dir, or delete {root} if nothing in it is needed")
        differing = changes({**found, "config_hash": None}, {**wanted, "config_hash": None})
        if not differing:
            return found
        made = [path for path in _visible(root) if path.name not in (name, *(intermediate or ()))]
        if intermediate is None or made or is_at_work(root):
            raise ValueError(
                f"{record} belongs to another run ({_said(differing)}); repeat its options to go on, choose another "
                f"output_dir, or delete {root} if nothing in it is needed"
            )
        for part in (root / name for name in intermediate):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        write_json(record, wanted)
        logger.info("%s: of a run that made nothing, with %s; replaced", record, _said(differing))
        return wanted
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir {root} is a file; choose a folder")
    other = _visible(root)
    if record.exists():  # another process of this run was faster
        return claim_folder(output_dir, name=name, provenance=provenance, intermediate=intermediate)
    if other:
        raise ValueError(
            f"output_dir {root} holds other files ({other[0].name}, ...) and no {name}; choose a new or empty folder"
        )
    write_json(record, wanted)
    return wanted


def _visible(root: Path) -> list[Path]:
    """What a folder holds, hidden files and folders apart; nothing when there is none."""
    return sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.exists() else []


_LONGEST, _MOST = 60, 5  # ours: characters of a value, and changes, that a message of one line has room for


def _said(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes by the names that options have, each with its two values, shortened."""
    parts = []
    for option, values in list(changes.items())[:_MOST]:
        place, _, file = option.partition("#")
        before, now = (text if len(text := str(value)) <= _LONGEST else text[:_LONGEST] + "..." for value in values)
        parts.append(f"{f'{place}: {file}' if '/' in file else option}: {before} there, {now} now")
    return "; ".join(parts) + (f"; and {len(changes) - _MOST} more" if len(changes) > _MOST else "")


NO_OPTIONS = ("files", "finalize", "imports", "initialize", "options", "run", "versions")
PLACES = (
    *("bundle_root", "ckpt_dir", "dataset_dir", "device", "num_workers", "output_dir", "shard", "shards"),
    *("tracking_uri", "use_cuda", "workers"),
)
"""Options that say where and by how many processes a run is made, not what comes out of it."""
CONFIG = "config"
"""Entry of what a run records: what its configs say beyond its options."""


def run_options(resolved: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Top-level options of a config: all values that JSON can hold, but for places and names to leave out.

    Args:
        resolved: id -> value of all that MONAI's `ConfigParser` has resolved so far; `$__local_refs` in a config. What
            a run is made of is resolved before the run begins.
        leave_out: further names: what only says where inputs lie, whose content is recorded instead.

    Returns:
        name -> value as JSON gives it back.
    """
    names = sorted(set(resolved) - {*NO_OPTIONS, *PLACES, *leave_out})
    top_level = [name for name in names if "::" not in name and not name.startswith("_")]
    return {name: plain_values(resolved[name]) for name in top_level if _is_plain(resolved[name])}


def config_beyond(options: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """What the configs of a command say beyond its options: nested values, which an override may have changed.

    Args:
        options: of :func:`run_options`, which are recorded as they are resolved.
        leave_out: as there.

    Returns:
        {:data:`CONFIG`: id -> value as it is written}, or nothing where the configs are not known.
    """
    known, apart = configured(), {*NO_OPTIONS, *PLACES, *leave_out}
    if known is None:
        return {}
    parts = {name: name.split("#") for name in known}
    beyond = {n: v for n, v in known.items() if parts[n][0] not in {*options, *apart} and parts[n][-1] not in apart}
    return {CONFIG: plain_values(beyond)}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """:func:`differences` of two runs, by the names that a user types; configs only where both runs know theirs."""
    first, second = dict(before), dict(now)
    configs = [options.pop(CONFIG, None) for options in (first, second)]
    return differences(first, second) | (differences(*configs) if None not in configs else {})


def _is_plain(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, int, float))


class RunFolder:
    """The folder of one run: claimed when everything is checked and work begins, locked until it ends.

    As a context it gives the provenance: what the folder's record holds, but for :data:`CONFIG`.

    Args:
        output_dir: a new or empty folder, or one that the same run began.
        record: name of the JSON file in it that says what the run is.
        resolved, leave_out: of :func:`run_options`.
        inputs: name -> dictionaries of files whose content determines the results.
        known: more of the provenance: program, version.
        shard: number of the part of the run that this process does.
        intermediate: of :func:`claim_folder`.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        record: str,
        resolved: Mapping[str, Any],
        leave_out: Sequence[str],
        inputs: Mapping[str, Sequence[Mapping[str, Any]]],
        known: Mapping[str, Any],
        shard: int = 0,
        intermediate: Sequence[str] | None = None,
    ) -> None:
        self.output_dir, self.record, self.resolved, self.leave_out = output_dir, record, resolved, leave_out
        self.inputs, self.known, self.shard, self.intermediate = inputs, known, shard, intermediate

    def __enter__(self) -> dict[str, Any]:
        """Claim and lock.

        Raises:
            ValueError, RuntimeError: as :func:`claim_folder` and :func:`lock_folder`.
        """
        leave_out = [*self.leave_out, *self.inputs]
        options = run_options(self.resolved, leave_out)
        inputs = {name: file_hashes(cases, ["image", "label", "file"]) for name, cases in self.inputs.items()}
        provenance = {**self.known, **inputs, **options, **config_beyond(options, leave_out)}
        claimed = claim_folder(self.output_dir, name=self.record, provenance=provenance, intermediate=self.intermediate)
        lock_folder(self.output_dir, self.shard)
        remove_leftovers(Path(self.output_dir), below=True)
        return {key: value for key, value in claimed.items() if key != CONFIG}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unlock_folder(self.output_dir, self.shard)

    def run(self, engine: Engine) -> None:
        """Run an engine that writes there."""
        with self:
            engine.run()
