"""Does a change keep the results? Runs every stage of two checkouts on the same phantoms and compares what they write.

    python benchmarks/same_results.py record --checkout . --output_dir runs/after
    python benchmarks/same_results.py record --checkout ../before --output_dir runs/before
    python benchmarks/same_results.py compare --before runs/before --after runs/after

Volumes, weights and tables are compared by content, not by file: packed bytes hold times. With the shipped weights of
each checkout, in single precision.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch

TINY = {"network_def#channels": [8, 8], "network_def#condition_channels": 4, "spacing_mm": [3.0, 3.0, 3.0]}
TRAINING = {"samples_per_epoch": 4, "max_epochs": 1, "val_interval": 1, "roi_margin": 8}


def _run(checkout: Path, work: Path, run_id: str, bundle: str, names: list[str], **options: Any) -> None:
    """One `python -m monai.bundle run` with the checkout's own `custom`."""
    root = checkout / "bundles" / bundle
    files = [str(root / "configs" / name) for name in names]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, f"--config_file={files}", f"--bundle_root={root}"]
    command += [f"--meta_file={root / 'configs/metadata.json'}", *(f"--{k}={v}" for k, v in options.items())]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with (work / f"{bundle}_{run_id}_{names[-1]}.log").open("w") as log:
        subprocess.run(command, check=True, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _phantoms(checkout: Path, work: Path) -> Path:
    """Four phantoms, and a list in which two pass for synthetic ones."""
    data = work / "phantoms"
    command = [sys.executable, "-m", "custom.phantom", "make", "--output_dir", str(data), "--subjects", "4"]
    command += ["--shape", "58,58,58", "--spacing_mm", "2.5", "--validation_fraction", "0.25", "--test_fraction"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([*command, "0.25"], check=True, cwd=work, env=environment, capture_output=True)
    return data


def _stages(checkout: Path, work: Path) -> None:
    data = _phantoms(checkout, work)
    pair = {key: str(data / f"{key}s/subject_000.nii.gz") for key in ("image", "label")}
    target = [str(data / "labels/subject_003.nii.gz")]
    generator, segmenter = "structdiff_cardiac", "structdiff_seg_cal"
    chain, amp = ["inference.json", "synthesize.json"], {"network_def#amp": False}
    rendering = {"target_masks": target, "templates": [pair], "sampling_steps": 3, "window_size": [48, 48, 48], **amp}
    _run(checkout, work, "run", generator, chain[:1], **rendering, spacing_mm=[2.5] * 3, output_dir=work / "rendered")
    rendering |= {"mode": "mask_only", "spacing_mm": [3.0] * 3, "output_dir": work / "mask_only"}
    _run(checkout, work, "run", generator, chain[:1], **rendering)
    masks = {"reference_datalist": data / "datalist.json", "count": 3, "with_image": True}
    _run(checkout, work, "generating", generator, ["generate_masks.json"], **masks, output_dir=work / "masks")
    training = {"dataset_dir": data, **TRAINING, **TINY, **amp, "roi_size": [24] * 3, "sampling_steps": 2}
    training |= {"val_cases": 1, "ckpt_dir": work / "models"}
    _run(checkout, work, "training", generator, ["train.json"], **training, output_dir=work / "training")
    evaluation = ["train.json", "evaluate.json"]
    _run(checkout, work, "evaluating", generator, evaluation, **training, output_dir=work / "evaluation")
    synthesis = {"template_datalist": data / "datalist.json", "sampling_steps": 3, "spacing_mm": [2.5] * 3, **amp}
    synthesis |= {"confidence_table": work / "confidence.json", "mask_datalist": work / "masks/datalist.json"}
    for method in ("predicted_variance", "skip_sampling"):
        options = {**synthesis, "method": method, "strides": [2, 3]}
        calibration = {**options, "mask_datalist": data / "datalist.json"}
        _run(checkout, work, "calibrating", generator, [*chain, "calibrate.json"], **calibration)
        (work / "confidence.json").replace(work / f"confidence_{method}.json")
        options["confidence_table"] = work / f"confidence_{method}.json"
        _run(checkout, work, "synthesizing", generator, chain, **options, output_dir=work / method)
    measuring = [*chain, "measure_set.json"]
    _run(checkout, work, "measuring", generator, measuring, **synthesis, output_dir=work / "predicted_variance")
    segmenting = {"dataset_dir": data, **TRAINING, "spacing_mm": [3.0] * 3, "roi_size": [32] * 3}
    segmenting["ckpt_dir"] = work / "segmenters"
    synthetic = {"synthetic_datalists": [str(work / "predicted_variance/datalist.json")], "warmup_epochs": 0}
    pretraining = ["train.json", "pretrain.json"]
    segmenting |= {"max_epochs": 2}
    _run(checkout, work, "pretraining", segmenter, pretraining, **segmenting, **synthetic, output_dir=work / "pre")
    _run(checkout, work, "training", segmenter, ["train.json"], **segmenting, output_dir=work / "fine")
    segmenting |= {"ckpt_dir": checkout / "bundles" / segmenter / "models", "output_dir": work / "segmenter"}
    _run(checkout, work, "evaluating", segmenter, evaluation, **segmenting)
    images = [str(data / "images/subject_003.nii.gz")]
    _run(checkout, work, "run", segmenter, ["inference.json"], images=images, output_dir=work / "segmented")


def _numbers(content: Any, name: str = "") -> dict[str, float]:
    """Numbers of nested JSON under names joined by dots."""
    if isinstance(content, dict):
        return {k: v for key, part in content.items() for k, v in _numbers(part, f"{name}.{key}").items()}
    if isinstance(content, list):
        return {k: v for i, part in enumerate(content) for k, v in _numbers(part, f"{name}.{i}").items()}
    return {name: float(content)} if isinstance(content, (int, float)) else {}


def _content(path: Path) -> dict[str, np.ndarray]:
    """Everything numeric in a file, by name."""
    if path.name.endswith(".nii.gz"):
        image = nib.load(path)
        return {"voxels": np.asarray(image.dataobj), "affine": image.affine}
    if path.suffix == ".pt":
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {key: value.numpy() for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        cells = {f"{i}.{k}": v for i, row in enumerate(rows) for k, v in row.items()}
        return {k: np.array(float(v)) for k, v in cells.items() if v.replace(".", "").replace("-", "").isdigit()}
    return {key: np.array(value) for key, value in _numbers(json.loads(path.read_text())).items()}


def record(checkout: str, output_dir: str) -> str:
    """Run all stages of a checkout and leave what they write below a new folder.

    Args:
        checkout: root of a checkout, with shipped weights in both bundles.
        output_dir: a new folder.
    """
    work = Path(output_dir).resolve()
    work.mkdir(parents=True)
    _stages(Path(checkout).resolve(), work)
    return str(work)


def compare(before: str, after: str) -> str:
    """Print, for every file that either wrote, whether its numbers are equal, or the largest difference.

    Args:
        before, after: folders that `record` made.
    """
    folders, lines = [Path(before), Path(after)], []
    kinds = ("*.nii.gz", "*.pt", "*.csv", "*.json")
    names = [{str(p.relative_to(f)) for kind in kinds for p in f.rglob(kind)} for f in folders]
    for name in sorted(names[0] | names[1]):
        if "/cache/" in name or name.endswith(("resume.pt", "generation.json", "rendering.json", "synthesis.json")):
            continue
        if not (name in names[0] and name in names[1]):
            lines.append(f"{name}: only {'before' if name in names[0] else 'after'}")
            continue
        one, two = (_content(folder / name) for folder in folders)
        other = sorted(set(one) ^ set(two))
        apart = {}
        for key in set(one) & set(two):
            same = one[key].shape == two[key].shape
            if not same or not np.array_equal(one[key], two[key], equal_nan=one[key].dtype.kind == "f"):
                apart[key] = float(np.abs(one[key].astype(float) - two[key].astype(float)).max()) if same else np.inf
        worst = max(apart, key=lambda key: apart[key]) if apart else ""
        words = f"{len(apart)} of {len(one)} differ, most {worst} by {apart[worst]:.3g}" if apart else "equal"
        lines.append(f"{name}: {words}" + (f"; names not in both: {other[:4]}" if other else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire({"record": record, "compare": compare})
