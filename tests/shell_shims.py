"""Stand-ins for `python` and `bash` on the path of a documented command: they record it, or run it on small volumes."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

from helpers import ROOT, TINY, TINY_TRAINING
from unit_tests.bundle_cases import OPEN_GATE

PHANTOMS = ["--shape", "58,58,58", "--spacing_mm", "2.5"]
SMALL = {
    **TINY,
    **TINY_TRAINING,
    "network_def#num_res_blocks": 1,
    "network_def#init_filters": 8,
    "max_epochs": 1,
    "count": 2,
    "gate": OPEN_GATE,  # as a whole: MONAI's command line drops single values of None
}
"""Overrides that make any config fast; each is passed where the configs have its id."""


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def recorders(folder: Path, *names: str) -> None:
    """Programs that write their arguments, separated by zero bytes, to new files in `$RECORD`."""
    for name in names:
        _script(folder / name, '#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" > "$(mktemp "$RECORD/XXXXXX")"\n')


def small_python(folder: Path) -> None:
    """`python` and `torchrun` that run the real ones on small phantoms with tiny networks; pytest only collects."""
    places = [str(ROOT / "tests"), str(ROOT / "ci"), str(ROOT)]
    here = f"import sys; sys.path[:0] = {places!r}; import shell_shims as s; "
    for name, prefix in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
        code = here + f"s.run_small({prefix!r} + sys.argv[1:])"
        _script(folder / name, f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')


def run_small(arguments: list[str]) -> None:
    """Replace this process by Python with the arguments, made small."""
    if "monai.bundle" in arguments and {"run", "ckpt_export", "onnx_export"} & {*arguments}:
        arguments = arguments + small_options(option(arguments, "config_file"))
    elif "custom.phantom" in arguments:
        arguments = arguments + PHANTOMS
    elif "pytest" in arguments:
        arguments = arguments + ["--collect-only", "-q"]
    os.execv(sys.executable, [sys.executable, *arguments])


def option(arguments: list[str], name: str) -> str:
    """Value of `--name VALUE` or `--name=VALUE`."""
    for i, argument in enumerate(arguments):
        if argument == f"--{name}":
            return arguments[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    raise ValueError(f"no --{name} in {arguments}")


def config_files(value: str) -> list[Path]:
    """Files of a `--config_file`, a path or a list."""
    return [Path(name) for name in (json.loads(value.replace("'", '"')) if value.startswith("[") else [value])]


def merged(value: str) -> dict:
    """Top-level content of the configs of a `--config_file`, in their order."""
    content: dict = {}
    for path in config_files(value):
        content |= json.loads(path.read_text())
    return content


def small_options(value: str) -> list[str]:
    """Options of `SMALL` whose ids the configs have; mask generation keeps its spacing and its gate."""
    config, options = merged(value), []
    for key, small in SMALL.items():
        parts, node = key.split("#"), config
        while parts and isinstance(node, dict) and parts[0] in node:
            node = node[parts.pop(0)]
        other_block = isinstance(small, dict) and isinstance(node, dict) and not node.keys() <= small.keys()
        if not parts and not other_block and not (key == "spacing_mm" and node is None):
            options.append(f"--{key}={small}")
    return options
