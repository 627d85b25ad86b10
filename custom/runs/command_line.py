"""The command line of a run and the configs that it names: what a user types, told apart from what there is."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

from custom.runs.options import GIVEN, refuse
from fire.parser import DefaultParseValue
from monai.bundle import ConfigComponent, ConfigParser
from monai.bundle.scripts import run

__all__ = ["check_command_line", "check_flags", "configured"]

_OTHER_KEYS = ("anatomy",)
"""Blocks that may get keys they have not: the class that reads them refuses what it does not know."""


def check_command_line(arguments: Sequence[str] | None = None) -> None:
    """Refuses options of `python -m monai.bundle run` that no config has: MONAI takes a misspelt one for a new id.

    The command line is looked at, not the config: what was added to that cannot be told from what it had. Also judged
    here, before anything is made of them, are the values, typed ones and those of config files, and those with a # in
    them, for which MONAI would write ::.
    In another process than that command nothing happens.

    Args:
        arguments: of the command, its name first; None takes those of the process.

    Raises:
        ValueError: naming the option and the nearest one that there is; or what a value must be.
    """
    given = _given(arguments)
    if "config_file" not in given:  # it stands in `args_file`, with more options
        return
    config = ConfigParser.load_config_files(_config_files(given))
    for name, value in given.items():
        if name in _OF_RUN:
            continue
        _check_name(name.removeprefix("+"), config)
        if value.startswith(("$", "@", "%")):
            continue
        if "#" in value:
            raise ValueError(
                f"{name}: must be without #, which MONAI changes to ::, got {value}; rename the file or folder"
            )
        typed = DefaultParseValue(value)  # as `fire` reads it: 2024 is a number, also where a folder is meant
        if typed is None:
            raise ValueError(
                f"{name}: must not be {value} here, which MONAI ignores; write null in a config file of yours"
            )
        if name in GIVEN and value and not GIVEN[name].holds(typed):
            refuse(name, GIVEN[name], typed)
    may_be_null = config.get("options", {}).get("may_be_null", [])
    for name, value in _stated(config):
        if name in given or _is_expression(value) or (value is None and name in may_be_null):
            continue
        if not GIVEN[name].holds(value):
            refuse(name, GIVEN[name], value)


def check_flags(commands: Mapping[str, Callable], arguments: Sequence[str] | None = None) -> None:
    """Refuses options that a command of `fire` has not: it would run the command first, and complain afterwards.

    Args:
        commands: name -> function.
        arguments: that were typed; None takes those of the process.

    Raises:
        ValueError: naming the option and the nearest one that there is.
    """
    name, *typed = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in commands:
        return
    known = [*signature(commands[name]).parameters]
    for flag, _ in _pairs(typed):
        if flag.replace("-", "_") not in [*known, "help", ""]:
            near = difflib.get_close_matches(flag, known, n=1)
            meant = f"did you mean --{near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"--{flag}: there is no such option of {name}; {meant}")


def _stated(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Option and value of all that config files state of what has a rule, as one key or as part of a block."""
    for name in GIVEN:
        node: Any = config
        for part in name.split("#"):
            node = node[part] if isinstance(node, Mapping) and part in node else _ABSENT
        yield from ((name, value) for value in (config.get(name, _ABSENT), node) if value is not _ABSENT)


_ABSENT = object()


def _is_expression(value: Any) -> bool:
    """Whether MONAI makes a value of something else first."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_is_expression, value.values()))
    if isinstance(value, list):
        return any(map(_is_expression, value))
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def configured(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """All that configs and command line say, as it is written there: also what a nested override changes.

    Args:
        arguments: of :func:`check_command_line`.

    Returns:
        id, with #, -> value; None in another process than that command, or where `args_file` names the configs.
    """
    given = _given(arguments)
    if "config_file" not in given:
        return None
    parser = ConfigParser(globals=False)
    parser.read_config(_config_files(given))
    parser.update({name: DefaultParseValue(value) for name, value in given.items() if name not in _OF_RUN})
    return dict(_leaves("", parser.config))


def _config_files(given: Mapping[str, str]) -> Any:
    """`a.json` and `['a.json','b.json']` as MONAI takes them."""
    files = DefaultParseValue(given["config_file"])
    return files if isinstance(files, (list, tuple)) else given["config_file"]


def _leaves(name: str, node: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(node, (dict, list)) or not node:
        yield name, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(f"{name}#{key}" if name else str(key), value)


_OF_RUN = {name for name, parameter in signature(run).parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
"""Arguments of `python -m monai.bundle run` itself."""


def _given(arguments: Sequence[str] | None) -> dict[str, str]:
    """Options of `python -m monai.bundle run` as they are typed; none in a process that is not that command."""
    if arguments is None:
        is_run = Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py")
        arguments = sys.argv[1:] if is_run else []
    return dict(_pairs(arguments))


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Name and value of `--name value` and `--name=value`; the value of a mere `--name` is empty.

    As `fire` has it, `-name` is an option too, but `-1` is a value.
    """
    flag = re.compile(r"--|-(?=[A-Za-z])")
    for position, argument in enumerate(arguments):
        if dashes := flag.match(argument):
            name, equals, value = argument[dashes.end() :].partition("=")
            following = arguments[position + 1 : position + 2]
            yield name, value if equals else "".join(v for v in following if not flag.match(v))


def _arguments(component: Mapping[str, Any]) -> Iterable[str] | None:
    """What the class of a component can be given; None where that cannot be known, or is anything."""
    try:
        made = locate(ConfigComponent(config=dict(component), id="").resolve_module_name())
        parameters = signature(made).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return [*parameters, "_mode_", "_disabled_", "_requires_", "_desc_"]


def _check_name(name: str, config: Mapping[str, Any]) -> None:
    node: Any = config
    parts = name.replace("::", "#").split("#")
    for depth, part in enumerate(parts):
        if depth and (parts[0] in _OTHER_KEYS or not isinstance(node, Mapping) or not node):
            return  # a list, or a block that may be anything
        arguments = _arguments(node) if depth and "_target_" in node else {}
        if arguments is None or part in arguments:
            return
        if "#".join(parts[: depth + 1]) in config:  # an override file writes "train#data" as one key
            node = config["#".join(parts[: depth + 1])]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            before = "".join(f"{p}#" for p in parts[:depth])
            known = {before + str(key): str(key) for key in [*node, *arguments] if not str(key).startswith("_")}
            known |= {str(key): str(key) for key in config}
            near = difflib.get_close_matches(part, known.values(), n=1)
            named = [option for option, last in known.items() if near and last == near[0]]
            meant = f"did you mean --{named[0]}?" if named else f"there are {', '.join(known)}"
            raise ValueError(f"{name}: there is no such option in these configs; {meant}")
