"""Every run of both bundles on the smallest input that it works with, started as from the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import monai.bundle
from helpers import BUNDLE, SEG_BUNDLE, TINY
from monai.bundle import ConfigParser
from monai.utils import set_determinism


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
        {**SET, "output_dir": "~/set", "classifier_steps": 1},
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


def parser_of(run: Run) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(run.bundle / "configs" / name) for name in run.configs])
    parser.read_meta(str(run.bundle / "configs/metadata.json"))
    parser.update({"bundle_root": str(run.bundle), "device": "cpu"})
    return parser


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
