"""Options checked before anything is read: every rule stands here, under the name that a user types."""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from fire.parser import DefaultParseValue
from monai.bundle import ConfigComponent, ConfigParser
from monai.bundle.scripts import run

__all__ = ["RULES", "check_command_line", "check_options", "configured", "is_number"]

_OTHER_KEYS = ("anatomy",)
"""Blocks that may get keys they have not: the class that reads them refuses what it does not know."""


@dataclass(frozen=True)
class Rule:
    """What an option must be.

    Attributes:
        text: after "must be".
        holds: whether a value is that.
        example: as it is typed.
    """

    text: str
    holds: Callable[[Any], bool]
    example: str


def is_number(value: Any) -> bool:
    """Whether a value of a config is a finite number, and no switch."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, (list, tuple)) and (length is None or len(value) == length)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_place(value: Any) -> bool:
    return _is_name(value) and "::" not in value  # MONAI has turned # into ::


def _is_folder(value: Any) -> bool:
    if not _is_place(value):
        return False
    try:
        return stat.S_ISDIR(os.stat(value).st_mode)
    except FileNotFoundError:
        return not os.path.islink(value)  # one that leads nowhere
    except (OSError, ValueError):  # below a file, not to be entered, a name that is too long or no name
        return False


def _whole(low: int, example: str, high: int | None = None) -> Rule:
    text = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return Rule(text, lambda v: _is_whole(v) and v >= low and (high is None or v <= high), example)


def _least(low: float, example: str) -> Rule:
    return Rule(f"a number of at least {low:g}", lambda v: is_number(v) and v >= low, example)


def _share(example: str, *, with_0: bool, with_1: bool) -> Rule:
    ends = [f"{end} itself" for end, allowed in ((0, with_0), (1, with_1)) if not allowed]
    text = "a number from 0 to 1" + (f" but not {' or '.join(ends)}" if ends else "")
    return Rule(text, lambda v: is_number(v) and 0 <= v <= 1 and (with_0 or v > 0) and (with_1 or v < 1), example)


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda v: v in names, names[0])


def _three(text: str, holds: Callable[[Any], bool], example: str) -> Rule:
    return Rule(f"three {text}, one for each axis", lambda v: _is_list(v, 3) and all(map(holds, v)), example)


def _is_device(value: Any) -> bool:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        return False
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    accelerator = torch.accelerator.current_accelerator()
    return device.type == "cpu" or (accelerator is not None and device.type == accelerator.type)


def _is_mapping_of_ids(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"from", "to"} or not all(map(_is_list, value.values())):
        return False
    ids = [*value["from"], *value["to"]]
    unique = len(set(map(str, value["from"]))) == len(value["from"]) == len(value["to"])
    return unique and all(_is_whole(k) and k >= 0 for k in ids)


def _files(value: Any) -> bool:
    return _is_place(value) or (_is_list(value) and len(value) > 0 and all(map(_is_place, value)))


def _some_files(value: Any) -> bool:
    return _is_list(value) and all(map(_is_place, value))


_PLACE = Rule("the name of a folder or file, without # and ::, which MONAI would change", _is_place, "./name")
_FOLDER = Rule(
    "the name of a folder, or of one that can be made, without # and ::, which MONAI would change", _is_folder, "./name"
)
_FILES = Rule("a list of file names, without # and ::, which MONAI would change", _files, "\"['./a.json','./b.json']\"")
_NAME = Rule("a name", _is_name, "training")
_SWITCH = Rule("true or false, which are typed True and False", lambda v: isinstance(v, bool), "True")
_WINDOW = Rule(
    "two numbers, the lower first", lambda v: _is_list(v, 2) and all(map(is_number, v)) and v[0] < v[1], '"[-200,800]"'
)
_LENGTHS = _three("lengths in mm above 0", lambda v: is_number(v) and v > 0, '"[1.5,1.5,1.5]"')
_CHANNELS = Rule(
    "a list of two or more whole numbers of at least 1",
    lambda v: _is_list(v) and len(v) > 1 and all(_is_whole(n) and n > 0 for n in v),
    '"[16,32,64]"',
)
_BLOCKS = Rule(
    "a list of one or more whole numbers of at least 1",
    lambda v: _is_list(v) and len(v) > 0 and all(_is_whole(n) and n > 0 for n in v),
    '"[1,2,2,4]"',
)
_CALLS = Rule(
    "two or more different whole numbers from 1 to 999",
    lambda v: _is_list(v) and all(_is_whole(n) and 0 < n < 1000 for n in v) and len(set(v)) == len(v) > 1,
    '"[4,6,8,12]"',
)
_SHARES = Rule(
    "three shares for template, mask only and unconditional, at least 0 and of sum 1",
    lambda v: _is_list(v, 3) and all(is_number(p) and p >= 0 for p in v) and abs(sum(v) - 1) < 1e-6,
    '"[0.85,0.1,0.05]"',
)
_BLOCK = Rule("a block of named values", lambda v: isinstance(v, Mapping), "{}")
_SHIFTS = Rule(
    "a number of at least 0, or a list with one for each label, background first",
    lambda v: all(is_number(s) and s >= 0 for s in (v if _is_list(v) and len(v) > 0 else [v])),
    "20",
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("bundle_root", "dataset_dir", "output_dir", "ckpt_dir"), _FOLDER),
    **dict.fromkeys(("pretrained", "best_weights", "confidence_table"), _PLACE),
    **dict.fromkeys(("datalists", "reference_datalist", "mask_datalist", "template_datalist"), _FILES),
    **dict.fromkeys(("training_datalists", "held_out_datalists", "synthetic_datalists"), _FILES),
    "real_datalists": Rule(_FILES.text, lambda v: _is_place(v) or _some_files(v), _FILES.example),
    **dict.fromkeys(("val_section", "mask_section", "template_section", "reference_section"), _NAME),
    **dict.fromkeys(("training_section", "run_name"), _NAME),
    "device": Rule("cpu, or a GPU that there is, as cuda:0", _is_device, "cpu"),
    "seed": _whole(0, "0", high=2**32 - 1),
    **dict.fromkeys(("amp", "use_prior"), _SWITCH),
    "with_image": Rule("true or false", lambda v: str(v).lower() in ("true", "false"), "true"),
    "label_mapping": Rule(
        "{'from': [...], 'to': [...]} with as many ids in both, none twice in 'from'",
        _is_mapping_of_ids,
        "\"{'from':[11,12],'to':[0,0]}\"",
    ),
    "spacing_mm": _LENGTHS,
    "roi_size": _three("whole numbers of voxels, at least 8", lambda v: _is_whole(v) and v >= 8, '"[64,64,64]"'),
    "window_size": _three(
        "even numbers of voxels, at least 2", lambda v: _is_whole(v) and v >= 2 and v % 2 == 0, '"[128,128,128]"'
    ),
    "grid": _three("whole numbers of voxels, at least 63", lambda v: _is_whole(v) and v >= 63, '"[64,64,64]"'),
    **dict.fromkeys(("intensity_hu", "intensity_window_hu"), _WINDOW),
    **dict.fromkeys(("max_epochs", "patience", "val_cases", "count", "images_per_mask"), _whole(1, "2")),
    **dict.fromkeys(("samples_per_epoch", "batch_size", "max_pairs", "candidates"), _whole(1, "2")),
    **dict.fromkeys(("roi_margin", "num_workers", "workers", "neighbours"), _whole(0, "0")),
    **dict.fromkeys(("val_interval", "warmup_epochs", "ramp_epochs", "shard"), _whole(0, "0")),
    "shards": _whole(1, "1"),
    "learning_rate": _least(0, "0.001"),
    "thin_weight": _least(1, "10"),
    "sampling_steps": _whole(1, "10", high=999),
    "strides": _CALLS,
    "mode_prob": _SHARES,
    "label_shift_hu": _SHIFTS,
    **dict.fromkeys(("contrast_shift_hu", "smoothing_mm", "margin_mm", "nsd_tolerance_mm"), _least(0, "1.0")),
    "cl_dice_weight": _least(0, "0.5"),
    "method": _one_of("predicted_variance", "skip_sampling"),
    "cache_rate": _share("1.0", with_0=True, with_1=True),
    "smallest_confidence": _share("0.05", with_0=True, with_1=False),
    "overlap": _share("0.25", with_0=True, with_1=False),
    "real_share": _share("0.25", with_0=False, with_1=False),
    "quantile": _share("0.9", with_0=False, with_1=False),
    **dict.fromkeys(("motion", "edits", "gate", "limits"), _BLOCK),
    "evaluations": Rule(
        "names and folders of evaluations",
        lambda v: isinstance(v, Mapping) and all(map(_is_place, v.values())),
        "\"{'real':'./evaluation'}\"",
    ),
    "network_def#channels": _CHANNELS,
    "network_def#correspondence_channels": _whole(0, "0"),
    **dict.fromkeys(("network_def#num_res_blocks", "network_def#condition_channels"), _whole(1, "2")),
    "network_def#init_filters": _whole(1, "8"),
    **dict.fromkeys(("network_def#blocks_down", "network_def#blocks_up"), _BLOCKS),
}
"""Option -> what it must be, in whichever config it stands; those that a class judges alone are not here."""

_GIVEN = {
    **RULES,
    "pretrained": Rule(
        "the name of a file of weights that is there", lambda v: _is_place(v) and os.path.isfile(v), "./model.pt"
    ),
}
"""What a user gives must be more than the default: weights to start from need not be there, named ones must."""


def check_options(
    used: Sequence[Any],
    *,
    resolved: Mapping[str, Any],
    may_be_null: Sequence[str] = (),
    multiples: Mapping[str, int] | None = None,
) -> None:
    """Refuses options that are out of range.

    Args:
        used: the options themselves, which a config lists as references, so that they are resolved before the call.
        resolved: id -> value of all that MONAI's `ConfigParser` has resolved, `$__local_refs` in a config. What stands
            in `RULES` is judged.
        may_be_null: names of options whose null has a meaning.
        multiples: option -> number that its sizes must be multiples of.

    Raises:
        ValueError: naming the option, what it must be, what it is, and an example.
    """
    for key, value in resolved.items():
        name = key.replace("::", "#")
        if name in RULES and not (value is None and name in may_be_null) and not RULES[name].holds(value):
            _refuse(name, RULES[name], value)
    for name, factor in (multiples or {}).items():
        wrong = [size for size in resolved[name] if size % factor]
        if wrong:
            rule = Rule(f"multiples of {factor}, as the network halves them", RULES[name].holds, RULES[name].example)
            _refuse(name, rule, resolved[name])


def _refuse(name: str, rule: Rule, value: Any) -> None:
    raise ValueError(f"{name}: must be {rule.text}, got {value!r}; for example --{name} {rule.example}")


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
        if name in _GIVEN and value and not _GIVEN[name].holds(typed):
            _refuse(name, _GIVEN[name], typed)
    may_be_null = config.get("options", {}).get("may_be_null", [])
    for name, value in _stated(config):
        if name in given or _is_expression(value) or (value is None and name in may_be_null):
            continue
        if not _GIVEN[name].holds(value):
            _refuse(name, _GIVEN[name], value)


def _stated(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Option and value of all that config files state of what has a rule, as one key or as part of a block."""
    for name in _GIVEN:
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
