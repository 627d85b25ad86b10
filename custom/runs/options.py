"""Options checked before anything is read: every rule stands here, under the name that a user types."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["GIVEN", "RULES", "check_options", "is_number", "refuse"]


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
_SPACING = Rule(
    f"{_LENGTHS.text}, or two, the finest and the coarsest",
    lambda v: _LENGTHS.holds(v) or (_is_list(v, 2) and all(map(is_number, v)) and 0 < v[0] <= v[1]),
    _LENGTHS.example,
)
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
_ARTEFACTS = ("plaques", "streaks", "motion")
_SOME_ARTEFACTS = Rule(
    f"a list, each at most once, of {', '.join(_ARTEFACTS)}",
    lambda v: _is_list(v) and all(isinstance(a, str) and a in _ARTEFACTS for a in v) and len(set(v)) == len(v),
    "\"['plaques','streaks']\"",
)
_FROM_TO = Rule(
    "two numbers of at least 0, the lower first, or twice the same",
    lambda v: _is_list(v, 2) and all(map(is_number, v)) and 0 <= v[0] <= v[1],
    '"[0.5,1.5]"',
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
    **dict.fromkeys(("amp", "use_prior", "save_structure"), _SWITCH),
    "with_image": Rule("true or false", lambda v: str(v).lower() in ("true", "false"), "true"),
    "label_mapping": Rule(
        "{'from': [...], 'to': [...]} with as many ids in both, none twice in 'from'",
        _is_mapping_of_ids,
        "\"{'from':[11,12],'to':[0,0]}\"",
    ),
    "spacing_mm": _SPACING,
    "roi_size": _three("whole numbers of voxels, at least 8", lambda v: _is_whole(v) and v >= 8, '"[64,64,64]"'),
    "window_size": _three(
        "even numbers of voxels, at least 2", lambda v: _is_whole(v) and v >= 2 and v % 2 == 0, '"[128,128,128]"'
    ),
    "grid": _three("whole numbers of voxels, at least 63", lambda v: _is_whole(v) and v >= 63, '"[64,64,64]"'),
    **dict.fromkeys(("intensity_hu", "intensity_window_hu"), _WINDOW),
    **dict.fromkeys(("max_epochs", "patience", "val_cases", "count", "images_per_mask"), _whole(1, "2")),
    **dict.fromkeys(
        ("samples_per_epoch", "pair_uses", "batch_size", "max_pairs", "candidates", "classifier_steps"), _whole(1, "2")
    ),
    **dict.fromkeys(("roi_margin", "num_workers", "workers", "neighbours"), _whole(0, "0")),
    **dict.fromkeys(("val_interval", "warmup_epochs", "moments_epochs", "ramp_epochs", "shard"), _whole(0, "0")),
    "shards": _whole(1, "1"),
    "learning_rate": _least(0, "0.001"),
    **dict.fromkeys(("thin_weight", "edge_weight"), _least(1, "10")),
    "clip_norm": Rule("a number above 0", lambda v: is_number(v) and v > 0, "1.0"),
    "sample_strength": _share("1.0", with_0=True, with_1=True),
    "grain": _least(0, "1.0"),
    **dict.fromkeys(("sampling_steps", "coarse_steps"), _whole(1, "10", high=999)),
    "strides": _CALLS,
    "mode_prob": _SHARES,
    "label_shift_hu": _SHIFTS,
    **dict.fromkeys(("contrast_shift_hu", "smoothing_mm", "margin_mm", "nsd_tolerance_mm"), _least(0, "1.0")),
    "cl_dice_weight": _least(0, "0.5"),
    "method": _one_of("predicted_variance", "skip_sampling"),
    "painted_classes": _whole(8, "12", high=15),
    **dict.fromkeys(("painted_blur_mm", "painted_grain"), _FROM_TO),
    "painted_artefacts": _SOME_ARTEFACTS,
    "mode": _one_of(
        "template", "mask_only", "painted"
    ),  # what nothing is told for is no cardiac CT yet (docs/FINDINGS.md)
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
    **dict.fromkeys(("network_def#num_res_blocks", "network_def#condition_channels"), _whole(1, "2")),
    "network_def#init_filters": _whole(1, "8"),
    **dict.fromkeys(("network_def#blocks_down", "network_def#blocks_up"), _BLOCKS),
}
"""Option -> what it must be, in whichever config it stands; those that a class judges alone are not here."""

GIVEN = {
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
            refuse(name, RULES[name], value)
    for name, factor in (multiples or {}).items():
        wrong = [size for size in resolved[name] if size % factor]
        if wrong:
            rule = Rule(f"multiples of {factor}, as the network halves them", RULES[name].holds, RULES[name].example)
            refuse(name, rule, resolved[name])


def refuse(name: str, rule: Rule, value: Any) -> None:
    """Say what an option must be, what it is, and an example."""
    raise ValueError(f"{name}: must be {rule.text}, got {value!r}; for example --{name} {rule.example}")
