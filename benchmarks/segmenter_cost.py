"""What the weighted loss adds to a training step, and what segmenting a large volume costs.

    python benchmarks/segmenter_cost.py

Steps with the two losses alternate in one process, so that a busy machine slows both; their ratio is the result. The
volume is a phantom of 144 mm on 256^3 voxels, segmented by the command of docs/SEGMENTER.md in a process of its own
with random weights: cost does not depend on them. The network sees 96^3 voxels of 1.5 mm; a second run keeps all 256^3.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from common import RESULTS, ROOT, machine
from custom.phantom.cohort import make_subject
from custom.runs.files import write_json
from custom.segmentation.loss import CALLoss
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
from scipy import ndimage

BUNDLE = ROOT / "bundles/structdiff_seg_cal"
SIZE, FIELD_MM, LABELS = 256, 144.0, 11


def configured_network() -> torch.nn.Module:
    """The network of the bundle."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs/train.json"))
    return parser.get_parsed_content("network_def")


def step_seconds(repeats: int) -> dict[str, list[float]]:
    """Seconds of whole training steps, batch 2 of 64^3, with each loss by turns."""
    network = configured_network()
    optimiser = torch.optim.AdamW(network.parameters())
    image, label = torch.rand(2, 1, 64, 64, 64), torch.randint(0, LABELS, (2, 1, 64, 64, 64)).float()
    weighted = {"label": label, "confidence": torch.rand_like(label), "sample_weight": torch.ones(2)}
    losses = {"DiceCELoss": (DiceCELoss(softmax=True, to_onehot_y=True), label), "CALLoss": (CALLoss(), weighted)}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats + 1):
        for name, (loss, target) in losses.items():
            start = time.perf_counter()
            optimiser.zero_grad()
            loss(network(image), target).backward()
            optimiser.step()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def segment(folder: Path, spacing_mm: float) -> dict[str, float]:
    """Seconds and peak memory of the inference command on the volume, start of Python included."""
    options = ["--images", f"['{folder / 'image.nii.gz'}']", "--ckpt_dir", str(folder)]
    options += ["--spacing_mm", str([spacing_mm] * 3), "--output_dir", str(folder / "out")]
    config = ["--config_file", str(BUNDLE / "configs/inference.json"), "--bundle_root", str(BUNDLE)]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *config, *options], check=True, capture_output=True, cwd=folder
    )
    seconds = time.perf_counter() - start
    found = nib.load(folder / "out/image_seg.nii.gz")
    if found.shape != (SIZE,) * 3:
        raise RuntimeError(f"the segmentation has {found.shape} voxels, not those of the image")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child so far, GiB
    return {"model_spacing_mm": spacing_mm, "seconds": seconds, "peak_gib": peak}


def main(repeats: int = 8) -> None:
    """Measure, print and write benchmarks/results/segmenter_cost.json.

    Args:
        repeats: training steps with each loss.
    """
    seconds = step_seconds(repeats)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratio = float(np.median(np.divide(seconds["CALLoss"], seconds["DiceCELoss"])))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = make_subject(0, 0).image
        large = ndimage.zoom(image.astype(np.float32), SIZE / image.shape[0], order=1)
        nib.save(nib.Nifti1Image(large, np.diag([FIELD_MM / SIZE] * 3 + [1.0])), folder / "image.nii.gz")
        torch.save(configured_network().state_dict(), folder / "model.pt")
        for spacing_mm in (1.5, FIELD_MM / SIZE):
            runs.append(segment(folder, spacing_mm))
    content = {"machine": machine(), "step_seconds": medians, "cal_step_ratio": ratio, "inference_256": runs}
    write_json(RESULTS / "segmenter_cost.json", content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    fire.Fire(main)
