"""How every entry point of every bundle is run on a few small phantoms: configs and options, as data.

The entries of a bundle are in the order in which each finds what the ones before it wrote.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from custom.evaluation.gate import ImageGate
from custom.phantom.cohort import make
from custom.runs.files import write_json

OPEN_GATE = dict.fromkeys(limit.name for limit in dataclasses.fields(ImageGate))
"""Rejects nothing: tiny networks render noise."""
TINY_DIFFUSION = {"network_def#channels": [8, 8], "network_def#condition_channels": 4, "spacing_mm": [3.0, 3.0, 3.0]}
TINY_SEGMENTER = {"network_def#init_filters": 8, "spacing_mm": [3.0, 3.0, 3.0], "roi_size": [32, 32, 32]}


class Entry(NamedTuple):
    """One entry point.

    Attributes:
        run_id: what `python -m monai.bundle run` is given.
        configs: names of config files, merged in this order.
        workflow_type: "train", "infer", or None where MONAI asks no properties of it.
        options: overrides by id.
        writes: files that it must leave, below the folder of the data.
    """

    run_id: str
    configs: tuple[str, ...]
    workflow_type: str | None
    options: Mapping[str, Any]
    writes: tuple[str, ...]


def make_data(folder: Path) -> None:
    """Writes four phantoms of 58^3 voxels, and a list in which those for training pass for synthetic ones.

    Args:
        folder: gets `data/datalist.json` (two cases for training, one each to validate and test) and
            `data/synthetic.json` (the two, with a confidence that falls from 1 to 0.05 along the first axis).
    """
    data = folder / "data"
    make(str(data), subjects=4, shape=(58, 58, 58), spacing_mm=2.5, validation_fraction=0.25, test_fraction=0.25)
    (data / "confidence").mkdir()
    cases = json.loads((data / "datalist.json").read_text())["training"]
    for score, case in enumerate(cases, start=4):
        label = nib.load(data / case["label"])
        confidence = np.broadcast_to(np.linspace(1, 0.05, label.shape[0])[:, None, None], label.shape)
        case["confidence"] = f"confidence/{Path(case['label']).name}"
        case["score_hu"] = float(score)
        nib.save(nib.Nifti1Image(confidence.astype(np.float32), label.affine), data / case["confidence"])
    write_json(data / "synthetic.json", {"training": cases})


def _trainings(folder: Path, options: Mapping[str, Any]) -> dict[str, Entry]:
    """Training, evaluation of its weights, and a training shared by processes, with weights of its own."""

    def entry(run_id: str, output: str, models: str, writes: tuple[str, ...], *more: str) -> Entry:
        places = {"ckpt_dir": str(folder / models), "output_dir": str(folder / output)}
        return Entry(run_id, ("train.json", *more), "train", {**options, **places}, writes)

    return {
        "train": entry("training", "training", "models", ("models/model.pt", "training/metrics.csv")),
        "evaluate": entry("evaluating", "evaluation", "models", ("evaluation/metrics.json",), "evaluate.json"),
        "multi_gpu_train": entry("training", "training2", "models2", ("models2/model.pt",), "multi_gpu_train.json"),
    }


def _structdiff_cardiac(folder: Path) -> dict[str, Entry]:
    data, models = folder / "data", {"ckpt_dir": str(folder / "models")}
    training = {
        **TINY_DIFFUSION,
        "dataset_dir": str(data),
        "roi_size": [24, 24, 24],
        "roi_margin": 8,
        "samples_per_epoch": 4,
        "max_epochs": 1,
        "val_interval": 1,
        "val_cases": 1,
        "sampling_steps": 2,
    }
    coarse = {key: value for key, value in training.items() if not key.startswith("network_def#")}
    coarse |= {"network_def#channels": [8, 16], "roi_size": [16, 16, 16]}
    coarse |= {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / "coarse")}
    template = {key: str(data / f"{key}s/subject_000.nii.gz") for key in ("image", "label")}
    rendering = {
        **TINY_DIFFUSION,
        **models,
        "sampling_steps": 2,
        "target_masks": [str(data / "labels/subject_003.nii.gz")],
        "templates": [template],
    }
    generating = {"reference_datalist": str(data / "datalist.json"), "count": 2, "output_dir": str(folder / "masks")}
    synthesis = {
        **TINY_DIFFUSION,
        **models,
        "sampling_steps": 2,
        "template_datalist": str(data / "datalist.json"),
        "gate": OPEN_GATE,
    }
    synthesizing = {"mask_datalist": str(folder / "masks/datalist.json"), "output_dir": str(folder / "synthetic")}
    chain = ("inference.json", "synthesize.json")

    return {
        **_trainings(folder, training),
        "train_coarse": Entry(
            "training", ("train.json", "train_coarse.json"), "train", coarse, ("models/coarse.pt", "coarse/metrics.csv")
        ),
        "inference": Entry(
            "run",
            ("inference.json",),
            "infer",
            {**rendering, "output_dir": str(folder / "rendered")},
            ("rendered/subject_003_from_subject_000.nii.gz",),
        ),
        "generate_masks": Entry(
            "generating", ("generate_masks.json",), None, generating, ("masks/datalist.json", "masks/summary.csv")
        ),
        "calibrate": Entry("calibrating", (*chain, "calibrate.json"), "infer", synthesis, ("models/confidence.json",)),
        "synthesize": Entry(
            "synthesizing",
            chain,
            "infer",
            {**synthesis, **synthesizing},
            ("synthetic/datalist.json", "synthetic/report.html"),
        ),
        "measure_set": Entry(
            "measuring",
            (*chain, "measure_set.json"),
            "infer",
            {**synthesis, **synthesizing},
            ("synthetic/set_metrics.json",),
        ),
    }


def _structdiff_seg_cal(folder: Path) -> dict[str, Entry]:
    data, models = folder / "data", {"ckpt_dir": str(folder / "models")}
    training = {
        **TINY_SEGMENTER,
        "dataset_dir": str(data),
        "roi_margin": 8,
        "samples_per_epoch": 4,
        "max_epochs": 1,
        "val_interval": 1,
    }

    pretraining = {"synthetic_datalists": [str(data / "synthetic.json")], "output_dir": str(folder / "pretraining")}
    images = {"images": [str(data / "images/subject_003.nii.gz")]}
    return {
        "pretrain": Entry(
            "pretraining",
            ("train.json", "pretrain.json"),
            "train",
            {**training, **models, **pretraining},
            ("models/pretrained.pt",),
        ),
        **_trainings(folder, training),
        "inference": Entry(
            "run",
            ("inference.json",),
            "infer",
            {**TINY_SEGMENTER, **models, **images, "output_dir": str(folder / "segmented")},
            ("segmented/subject_003_seg.nii.gz",),
        ),
    }


CASES: dict[str, Callable[[Path], dict[str, Entry]]] = {
    "structdiff_cardiac": _structdiff_cardiac,
    "structdiff_seg_cal": _structdiff_seg_cal,
}


def entries(bundle: str, folder: Path) -> dict[str, Entry]:
    """Entry points of a bundle, on the data that `make_data` wrote.

    Args:
        bundle: its name.
        folder: holds `data`; everything is written below it.

    Raises:
        ValueError: for a bundle without a case.
    """
    if bundle not in CASES:
        raise ValueError(
            f"bundle: {bundle} has no case in ci/unit_tests/bundle_cases.py, only {sorted(CASES)}; add one"
        )
    return CASES[bundle](folder)
