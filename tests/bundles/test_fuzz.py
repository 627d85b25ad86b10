"""Spoilt files and options, drawn by a seed, through every run of both bundles as `python -m monai.bundle run` does it.

    STRUCTDIFF_FUZZ_SEED=7 STRUCTDIFF_FUZZ_COUNT=300 pytest tests/bundles/test_fuzz.py

draws others. Each ends in an error whose last line names the file or option of the user and what would be right, and
leaves every file as it was; what may be meant is done instead, whole. There is no third way.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from custom.checks import cause_of
from custom.phantom.cohort import make
from custom.runs.options import RULES
from helpers import BUNDLE, SEG_BUNDLE, TINY
from monai.bundle import ConfigParser
from monai.utils import set_determinism

SEED = int(os.environ.get("STRUCTDIFF_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("STRUCTDIFF_FUZZ_COUNT", "240"))
SAMPLE = 12
"""Cases of the fast suite."""


@dataclass(frozen=True)
class Run:
    """A run on the smallest input that it works with.

    Attributes:
        options: of a user; `~` is the user's folder.
        images, labels: files that it reads, spoilt one at a time.
        lists: datalists that it reads, and the section.
        states: file that earlier runs wrote -> options that make the run read it.
    """

    bundle: Path
    configs: tuple[str, ...]
    run_id: str
    options: Mapping[str, Any]
    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    lists: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FIRST, SECOND, THIRD = (f"subject_{k:03d}.nii.gz" for k in (0, 2, 3))
"""Of training, validation and test."""
NEW = {"output_dir": "~/out"}
DATA = {"dataset_dir": "~/data"}
SMALL = {**TINY, "spacing_mm": [4.0, 4.0, 4.0], "device": "cpu"}
TRAINING = {**SMALL, **NEW, **DATA, "roi_size": [16] * 3, "roi_margin": 4, "samples_per_epoch": 2, "max_epochs": 1}
TRAINING |= {"val_cases": 1, "sampling_steps": 1}
SET = {**SMALL, "template_datalist": "~/data/datalist.json", "mask_datalist": "~/masks/datalist.json"}
SET |= {"ckpt_dir": "~/models", "template_choice": "source", "sampling_steps": 1}
SET |= {
    "gate#max_label_error_hu": 1000.0,
    "gate#max_label_sd_ratio": 100.0,
    "gate#min_vessel_contrast": -100.0,
    "gate#min_vessel_continuity": -100.0,
    "gate#max_template_copy": 2.0,
    "gate#plausible_hu": {},
}
SEG_SMALL = {"spacing_mm": [4.0] * 3, "roi_size": [16] * 3, "device": "cpu", "network_def#init_filters": 4}
SEG_SMALL |= {"network_def#blocks_down": [1, 1], "network_def#blocks_up": [1]}
SEG = {**SEG_SMALL, **NEW, **DATA, "roi_margin": 4, "samples_per_epoch": 2, "max_epochs": 1}
TRAINED = {"images": (f"data/images/{FIRST}", f"data/images/{SECOND}")}
TRAINED |= {"labels": (f"data/labels/{FIRST}", f"data/labels/{SECOND}"), "lists": {"data/datalist.json": "training"}}
TESTED = {"images": (f"data/images/{THIRD}",), "labels": (f"data/labels/{THIRD}",)}
TESTED |= {"lists": {"data/datalist.json": "test"}}
TEMPLATE = {"images": (f"data/images/{FIRST}",), "labels": (f"data/labels/{FIRST}", "masks/masks/mask_0000.nii.gz")}
TEMPLATE |= {"lists": {"data/datalist.json": "training", "masks/datalist.json": "training"}}
INTERRUPTED = {"output_dir": "~/interrupted"}
RUNS = {
    "training": Run(
        *(BUNDLE, ("train.json",), "training", {**TRAINING, "ckpt_dir": "~/new"}),
        **TRAINED,
        states={"interrupted/resume.pt": INTERRUPTED},
    ),
    "evaluating": Run(
        *(BUNDLE, ("train.json", "evaluate.json"), "evaluating", {**TRAINING, "ckpt_dir": "~/models"}),
        **TESTED,
        states={"models/model.pt": {}},
    ),
    "rendering": Run(
        *(BUNDLE, ("inference.json",), "run"),
        {
            **(SMALL | NEW),
            "ckpt_dir": "~/models",
            "sampling_steps": 1,
            "target_masks": [f"~/data/labels/{THIRD}"],
            "templates": [{"image": f"~/data/images/{FIRST}", "label": f"~/data/labels/{FIRST}"}],
        },
        images=(f"data/images/{FIRST}",),
        labels=(f"data/labels/{FIRST}", f"data/labels/{THIRD}"),
        states={"models/model.pt": {}},
    ),
    "generating": Run(
        *(
            BUNDLE,
            ("generate_masks.json",),
            "generating",
            {**NEW, **DATA, "count": 2, "with_image": True, "neighbours": 0},
        ),
        **{key: value[:1] if key != "lists" else value for key, value in TRAINED.items()},
        states={name: {"output_dir": "~/masks"} for name in ("masks/generation.json",)},
    ),
    "synthesizing": Run(
        *(BUNDLE, ("inference.json", "synthesize.json"), "synthesizing", {**SET, **NEW}),
        **TEMPLATE,
        states={"models/model.pt": {}, "models/confidence.json": {}, "set/synthesis.json": {"output_dir": "~/set"}},
    ),
    "reporting": Run(
        *(BUNDLE, ("inference.json", "synthesize.json"), "reporting", {**SET, "output_dir": "~/set"}),
        images=("set/{image}", f"data/images/{FIRST}"),
        labels=("set/{label}", f"data/labels/{FIRST}"),
        states={"set/datalist.json": {}, "set/{record}": {}},
    ),
    "calibrating": Run(
        *(BUNDLE, ("inference.json", "synthesize.json", "calibrate.json"), "calibrating"),
        {
            **SET,
            **NEW,
            "mask_datalist": "~/data/datalist.json",
            "template_choice": "all",
            "confidence_table": "~/new/confidence.json",
        },
        images=(f"data/images/{FIRST}",),
        labels=(f"data/labels/{FIRST}", f"data/labels/{SECOND}"),
        lists={"data/datalist.json": "training"},
        states={"models/model.pt": {}},
    ),
    "measuring": Run(
        *(BUNDLE, ("inference.json", "synthesize.json", "measure_set.json"), "measuring"),
        {**SET, "output_dir": "~/set"},
        images=("set/{image}", f"data/images/{FIRST}", f"data/images/{SECOND}"),
        labels=("set/{label}", f"data/labels/{FIRST}", f"data/labels/{THIRD}"),
        lists={"data/datalist.json": "validation"},
        states={"set/datalist.json": {}, "set/{record}": {}},
    ),
    "seg_training": Run(
        *(SEG_BUNDLE, ("train.json",), "training", {**SEG, "ckpt_dir": "~/new"}),
        **TRAINED,
        states={"seg/model.pt": {"pretrained": "~/seg/model.pt"}, "interrupted/resume.pt": INTERRUPTED},
    ),
    "seg_pretraining": Run(
        *(SEG_BUNDLE, ("train.json", "pretrain.json"), "pretraining"),
        {
            **SEG,
            "ckpt_dir": "~/new",
            "synthetic_datalists": ["~/set/datalist.json"],
            "real_datalists": ["~/data/datalist.json"],
        },
        images=("set/{image}", f"data/images/{FIRST}"),
        labels=("set/{label}", "set/{confidence}"),
        lists={"set/datalist.json": "training", "data/datalist.json": "training"},
    ),
    "seg_evaluating": Run(
        *(SEG_BUNDLE, ("train.json", "evaluate.json"), "evaluating", {**SEG, "ckpt_dir": "~/seg"}),
        **TESTED,
        states={"seg/model.pt": {}},
    ),
    "segmenting": Run(
        *(SEG_BUNDLE, ("inference.json",), "run"),
        {**SEG_SMALL, **NEW, "ckpt_dir": "~/seg", "images": [f"~/data/images/{THIRD}"]},
        images=(f"data/images/{THIRD}",),
        states={"seg/model.pt": {}},
    ),
}


# ---- starting a run, and what its end must be


def at_home(value: Any, home: Path) -> Any:
    """Options with `~` replaced."""
    if isinstance(value, dict):
        return {key: at_home(inner, home) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_home(inner, home) for inner in value]
    return re.sub("^~", str(home), value) if isinstance(value, str) else value


def start(run: Run, home: Path, options: Mapping[str, Any], in_file: Mapping[str, Any]) -> None:
    """Run as from the command line, with options typed there and others in a config file of the user's."""
    configs = [str(run.bundle / "configs" / name) for name in run.configs]
    if in_file:
        (home / "mine.json").write_text(json.dumps(at_home(dict(in_file), home)))
        configs.append(str(home / "mine.json"))
    given = {"bundle_root": str(run.bundle), "config_file": str(configs), "logging_file": "False"}
    given |= {"meta_file": str(run.bundle / "configs/metadata.json")}
    typed = {name: value for name, value in {**given, **at_home(dict(options), home)}.items() if name not in in_file}
    arguments = ["run", run.run_id]
    for name, value in typed.items():
        arguments += [f"--{name}", value if isinstance(value, str) else repr(value)]
    before = sys.argv, sys.excepthook
    sys.argv = [str(Path(monai.bundle.__file__).parent / "__main__.py"), *arguments]
    try:
        fire.Fire({"run": monai.bundle.run}, command=arguments)
    finally:
        sys.argv, sys.excepthook = before
        set_determinism(None)


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


OWN = re.compile(r"/\.\w[\w.]*\.lock$|/out/(generation|synthesis)\.json$")
"""What a run says of itself before it makes anything: who is at work, and with which options; others take it over."""


def assert_clear(error: BaseException, names: tuple[str, ...], before: Mapping, after: Mapping) -> None:
    """An error as a user needs it; see the head of this file.

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
    for path in after:
        assert (
            not path.endswith(("/generation.json", "/synthesis.json"))
            or path in before
            or json.loads(Path(path).read_text())
        )


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


# ---- ways to spoil a file: (path, rng) -> None


def rewritten(change: Callable[[np.ndarray, np.ndarray, random.Random], tuple[Any, Any]]) -> Callable:
    """Spoil voxels and affine of a volume."""

    def spoil(path: Path, rng: random.Random) -> None:
        source = nib.load(path)
        values, affine = change(np.asarray(source.dataobj), source.affine.copy(), rng)
        path.unlink()
        nib.save(nib.Nifti1Image(values, affine), path)

    return spoil


def with_voxel(values: np.ndarray, value: float, rng: random.Random) -> np.ndarray:
    result = values.astype(np.float32)
    result[tuple(rng.randrange(n) for n in values.shape)] = value
    return result


def any_nan(v, a, rng):
    return with_voxel(v, rng.choice([np.nan, np.inf, -np.inf]), rng), a


def byte_scale(v, a, rng):
    low, high = rng.uniform(-400, 0), rng.uniform(500, 1500)
    return (np.clip((v - low) / (high - low), 0, 1) * 255).astype(np.uint8), a


def unit_scale(v, a, rng):
    return ((v - v.min()) / (v.max() - v.min()) * rng.choice([1, 2]) - rng.choice([0, 1])).astype(np.float32), a


def unsigned(v, a, rng):
    return (v.astype(np.int32) + rng.choice([1024, 1000, 2048])).clip(0).astype(np.uint16), a


def constant(v, a, rng):
    return np.full(v.shape, rng.choice([0, -1000, 40, 255]), np.int16), a


def two_volumes(v, a, rng):
    return np.stack([v] * rng.randint(2, 4), -1), a


def colours(v, a, rng):
    return np.zeros(v.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]), a


def flat(v, a, rng):
    return v[:, :, rng.randrange(v.shape[2])], a


def one_slice(v, a, rng):
    return v[:, :, :1], a


def other_grid(v, a, rng):
    axis = rng.randrange(3)
    if rng.random() < 0.5:
        return np.take(v, range(v.shape[axis] - rng.randint(1, 5)), axis), a
    a[axis, 3] += rng.choice([-1, 1]) * rng.uniform(1, 200)
    return v, a


def metres(v, a, rng):
    return v, np.diag([1e-3, 1e-3, 1e-3, 1]) @ a


def inches(v, a, rng):
    return v, a @ np.diag([1, 1, rng.uniform(4, 20), 1])


def header(change: Callable[[bytearray, random.Random], None]) -> Callable:
    """Spoil bytes of a header."""

    def spoil(path: Path, rng: random.Random) -> None:
        content = bytearray(gzip.decompress(path.read_bytes()))
        change(content, rng)
        path.unlink()
        path.write_bytes(gzip.compress(bytes(content), 1))

    return spoil


DIM, PIXDIM, FORMS, QFORM, SROW = 40, 76, 252, 256, 280
"""Offsets in a NIfTI header."""


def bad_pixdim(content, rng):
    struct.pack_into("<f", content, PIXDIM + 4 * rng.randint(1, 3), rng.choice([0, math.nan, -1.5, math.inf, 1e-9]))


def bad_dim(content, rng):
    struct.pack_into("<h", content, DIM + 2 * rng.randint(1, 3), rng.choice([0, -3, 32767]))


def bad_rank(content, rng):
    struct.pack_into("<h", content, DIM, rng.choice([0, -1, 9, 300]))


def bad_sform(content, rng):
    row = rng.randrange(3)
    if rng.random() < 0.5:
        struct.pack_into("<4f", content, SROW + 16 * row, 0, 0, 0, 0)
    else:
        struct.pack_into("<f", content, SROW + 16 * row + 4 * rng.randrange(4), rng.choice([math.nan, math.inf]))


def moved_qform(content, rng):
    struct.pack_into("<2h", content, FORMS, 1, 1)
    place = QFORM + 12 + 4 * rng.randrange(3)
    struct.pack_into("<f", content, place, struct.unpack_from("<f", content, place)[0] + rng.uniform(2, 300))


def turned_qform(content, rng):
    struct.pack_into("<2h", content, FORMS, 1, 1)
    struct.pack_into("<3f", content, QFORM, *rng.choice([(0.9, 0.9, 0), (math.nan, 0, 0), (0, 0.3, 0.3)]))


def no_form(content, rng):
    struct.pack_into("<2h", content, FORMS, 0, 0)


def bad_type(content, rng):
    struct.pack_into("<h", content, 70, rng.choice([1, 32, 128, 1792, 9999]))


def bad_scale(content, rng):
    """Readers leave out a factor that is no number."""
    struct.pack_into("<2f", content, 112, rng.choice([math.nan, math.inf, 1e30]), 0)


def flipped(content, rng):
    """Any bits that say what the file holds and where it lies."""
    for _ in range(rng.randint(1, 3)):
        content[rng.choice([*range(4), *range(40, 124), *range(252, 348)])] ^= 1 << rng.randrange(8)


def raw(change: Callable[[bytes, random.Random], bytes]) -> Callable:
    """Replace all of a file."""

    def spoil(path: Path, rng: random.Random) -> None:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(change(content, rng))

    return spoil


def cut(content, rng):
    return content[: rng.randrange(1, len(content) - 12)]


def cut_inside(content, rng):
    whole = gzip.decompress(content)
    return gzip.compress(whole[: rng.randrange(1, len(whole) - 4)])


def empty(content, rng):
    return b""


def garbage(content, rng):
    return rng.randbytes(rng.choice([7, 348, 4096]))


def text(content, rng):
    return rng.choice([b"patient 7\n" * 50, b"{}", b"<html>not found</html>", "Größe".encode("latin-1") * 99])


def damaged(content, rng):
    changed = bytearray(content)
    for _ in range(8):
        changed[rng.randrange(20, len(content))] ^= 0xFF
    return bytes(changed)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


FILE = {spoil.__name__: raw(spoil) for spoil in (cut, cut_inside, empty, garbage, text)}
FILE |= {spoil.__name__: spoil for spoil in (folder, dangling, missing)}
HEADER = {
    spoil.__name__: header(spoil)
    for spoil in (bad_pixdim, bad_dim, bad_rank, bad_sform, moved_qform, turned_qform, no_form, bad_type)
}
VOXELS = {spoil.__name__: rewritten(spoil) for spoil in (any_nan, two_volumes, colours, flat, metres, inches)}
IMAGE = {**FILE, **HEADER, **VOXELS}
IMAGE |= {spoil.__name__: rewritten(spoil) for spoil in (byte_scale, unit_scale, unsigned, constant, one_slice)}


def unknown_id(v, a, rng):
    return np.where(v == rng.choice(np.unique(v)[1:].tolist()), rng.choice([15, 42, 200, 255]), v).astype(np.uint8), a


def negative_id(v, a, rng):
    return np.where(v == rng.choice(np.unique(v)[1:].tolist()), -rng.randint(1, 9), v).astype(np.int16), a


def fraction(v, a, rng):
    return with_voxel(v, rng.choice([0.5, 2.25, 9.9]), rng), a


def background(v, a, rng):
    return np.zeros_like(v), a


LABEL = {**FILE, **HEADER, **VOXELS}
LABEL |= {spoil.__name__: rewritten(spoil) for spoil in (unknown_id, negative_id, fraction, background)}


def one_label_less(v, a, rng):
    return np.where(v == rng.randint(1, 10), 0, v).astype(np.uint8), a


def torn(v, a, rng):
    """A speck of a label far from it."""
    v = v.copy()
    v[1:3, 1:3, 1:3] = rng.randint(1, 10)
    return v, a


LEGAL = {"flipped": header(flipped), "bad_scale": header(bad_scale), "damaged": raw(damaged)}
"""What may leave a good file: the run is refused clearly or does its work."""
LEGAL_LABEL = {spoil.__name__: rewritten(spoil) for spoil in (one_label_less, torn)}


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


# ---- ways to spoil an option

BLOCKS = {"generating": ("motion", "edits", "gate"), "synthesizing": ("gate",), "measuring": ("limits",)}
"""What a run reads of these; others have them from the configs before, and make nothing of them."""
TABLES = {"contrast_sd_hu": 20, "components": 1, "handles": 0, "nominal_hu": 40, "thin": False, "keep": False}
TABLES |= {"touches": [6], "plausible_hu": [30, 220], "class_weight": 1.0, "pieces_kept": 1, "wall": True, "name": "x"}
NULLS = ("gate", "edits", "pieces_kept", "plausible_hu", "nominal_hu", "spacing_mm")
"""Last or first words of options for which null may have a meaning."""
UNBOUNDED = ("count", "retries", "max_epochs", "samples_per_epoch", "workers", "num_workers")
"""Which a run is right to take however long it will need."""


def parser_of(run: Run) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(run.bundle / "configs" / name) for name in run.configs])
    parser.read_meta(str(run.bundle / "configs/metadata.json"))
    parser.update({"bundle_root": str(run.bundle), "device": "cpu"})
    return parser


def options_of(run: Run) -> dict[str, Any]:
    """Options of a run and their defaults: those with a rule, of blocks, of a row of the anatomy, of the network."""
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


# ---- drawing


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
    if len(run.labels) > 1 and "data" in file and key not in ("rendering",):
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
    return Case(
        key,
        f"{way} in {section!r} of {file}",
        (f"~/{file}", *["datalists"] * (way == "elsewhere")),  # trainings look for files of all lists at once
        lambda home: LIST[way](home / file, random.Random(seed), section),
    )


def draw_state(key: str, rng: random.Random, home: Path) -> Case:
    file, options = rng.choice(sorted(RUNS[key].states.items(), key=lambda item: item[0]))
    file = named(file, home)
    doubtful = LEGAL_STATE if file.endswith(".json") else {"damaged": raw(damaged)}
    ways = JSON_STATE if file.endswith(".json") else RESUME if "resume" in file else WEIGHTS
    ways = {**ways, **doubtful}
    way = rng.choice(sorted(ways))
    seed = rng.random()
    return Case(
        key,
        f"{way} of {file}",
        (f"~/{file}",),
        lambda home: ways[way](home / file, random.Random(seed)),
        options=options,
        sure=way not in doubtful,
    )


def draw_option(key: str, rng: random.Random, home: Path) -> Case:
    defaults = options_of(RUNS[key])
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
    known = options_of(RUNS[key])
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


# ---- the user's folder


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, and nothing logged to MLflow, whose stores take seconds each; the log of a failed run may stay."""
    with pytest.MonkeyPatch.context() as patch:
        for place in (
            "custom.masks.summary.log_run",
            "custom.synthesis.report.log_run",
            "custom.evaluation.sets.log_run",
        ):
            patch.setattr(place, lambda *args, **options: None)
        patch.setattr("custom.runs.LogToMLFlow.__init__", lambda self, *args, **options: None)
        patch.setattr("custom.runs.LogToMLFlow.attach", lambda self, engine: None)
        patch.setattr(sys, "path", [*sys.path])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms and weights, in a folder that lies beside the user's."""
    root = tmp_path_factory.mktemp("fuzz") / "kept"
    make(
        str(root / "data"), subjects=4, shape=(48, 48, 48), spacing_mm=2.5, validation_fraction=0.25, test_fraction=0.25
    )
    shutil.rmtree(root / "data/clean", ignore_errors=True)
    for key, folder in (("training", "models"), ("seg_training", "seg")):
        parser = parser_of(RUNS[key])
        parser.update({name: value for name, value in RUNS[key].options.items() if "#" in name})
        (root / folder).mkdir()
        torch.manual_seed(0)
        network = parser.get_parsed_content("network_def")
        if hasattr(network, "moments"):  # little noise, else limits reject what is rendered
            network.moments.set_table(torch.full_like(network.moments.table, 0.1))
        torch.save(network.state_dict(), root / folder / "model.pt")
    (root / "interrupted").mkdir()
    torch.save({}, root / "interrupted/resume.pt")
    return root


@pytest.fixture
def home(kept: Path) -> Path:
    """The user's folder as it was, always in one place, since records of runs hold paths."""
    return fresh(kept)


def fresh(kept: Path) -> Path:
    shutil.rmtree(kept.parent / "home", ignore_errors=True)
    shutil.copytree(kept, kept.parent / "home", copy_function=os.link)
    return kept.parent / "home"


@pytest.fixture(scope="module")
def complete(kept: Path) -> Path:
    """With masks, a confidence table and a synthetic set, which the runs themselves have made."""
    home = fresh(kept)
    start(RUNS["generating"], home, {**RUNS["generating"].options, "output_dir": "~/masks"}, {})
    table = {"confidence_table": "~/models/confidence.json"}
    start(RUNS["calibrating"], home, {**RUNS["calibrating"].options, **table}, {})
    start(RUNS["synthesizing"], home, {**RUNS["synthesizing"].options, "output_dir": "~/set"}, {})
    shutil.rmtree(kept)
    home.rename(kept)
    return kept


def judge(case: Case, home: Path) -> None:
    """Run a case and look at its end."""
    case.spoil(home)
    if case.in_file:
        (home / "mine.json").touch()
    options = {**RUNS[case.run].options, **case.options, **case.in_file}
    names = tuple(re.sub("^~", str(home), name) for name in case.names)
    before = contents(home)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start(RUNS[case.run], home, options, case.in_file)
    except (Exception, SystemExit) as error:
        after = contents(home)
        for found in (before, after):
            found.pop(str(home / "mine.json"), None)
        try:
            assert_clear(error, names, before, after)
        except AssertionError as unclear:
            raise AssertionError(f"{case.run}, {case.text}: {unclear}") from error
    else:
        assert not case.sure, f"{case.run}, {case.text}: done without a word"
        assert_whole(home / "out")


@pytest.mark.slow
@pytest.mark.parametrize("key", RUNS)
def test_good_files_and_options_are_no_obstacle(complete, home, key):
    """So that every refusal is due to what was spoilt."""
    start(RUNS[key], home, RUNS[key].options, {})
    assert_whole(home)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(COUNT))
def test_whatever_is_spoilt_is_refused_clearly_or_does_no_harm(complete, home, index):
    judge(draw(index, list(RUNS), home), home)


@pytest.mark.parametrize("index", range(SAMPLE))
def test_a_sample_of_the_above(kept, home, index):
    cheap = [key for key, run in RUNS.items() if "set" not in str(run) and "masks/" not in str(run)]
    judge(draw(index, cheap, home), home)
