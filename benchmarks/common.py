"""What every benchmark shares: the labels, where results go and what machine made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from custom.diffusion.grain import MeasureGraind, SplitNoised
from custom.diffusion.transforms import AlignTemplated, LabelStatisticsd
from custom.runs.weights import LoadWeights
from custom.volumes.anatomy import Anatomy
from monai.bundle import ConfigParser
from monai.transforms import Compose
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = ROOT / "docs/pictures"
TRAIN_CONFIG = ROOT / "bundles/structdiff_cardiac/configs/train.json"
ANATOMY = Anatomy(json.loads(TRAIN_CONFIG.read_text())["anatomy"])


def edge_bins(label: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Bin of the distance of each voxel to the nearest voxel of another label: below 1, 2, 4, 8 mm, and beyond."""
    distance = np.full(label.shape, np.inf)
    for value in np.unique(label):
        inside = label == value
        if not inside.all():
            distance[inside] = ndimage.distance_transform_edt(inside, sampling=spacing_mm)[inside]
    return np.digitize(distance, (1.0, 2.0, 4.0, 8.0))


def _without_folders(argument: str) -> str:
    """An absolute path on this machine tells a reader nothing but its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def machine() -> dict[str, Any]:
    """Processor, threads and versions, for the record."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "processor": capabilities.get("cpu_name", platform.processor()),
        "native_bf16": bool(capabilities.get("avx512_bf16", False)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folders, sys.argv[1:])]),
    }


def known(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics of an evaluation but for those that are not defined, which JSON holds as null."""
    return {name: value for name, value in metrics.items() if value is not None}


def command_cost(configs: Sequence[str], *, bundle: Path, run_id: str = "run", **options: Any) -> dict[str, float]:
    """Seconds, of the clock and of the processors, and peak GiB of a bundle's command in a process of its own.

    Args:
        configs: names of files in the bundle's `configs`.
        bundle: its root.
        run_id: what of them is run.
        options: of the command line.

    Raises:
        RuntimeError: with the end of what a command that failed has said.
    """
    given = {"config_file": [str(bundle / "configs" / name) for name in configs], "bundle_root": bundle, **options}
    command = [sys.executable, "-m", "monai.bundle", "run", run_id]
    command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            raise RuntimeError(f"{command} failed:\n{log.read()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": usage.ru_maxrss / 2**20}


def template_chain(labels: Sequence[int]) -> Compose:
    """What inference.json makes of a template: split into structure and grain, measured, aligned to the target."""
    keys = {"image_key": "template_image", "label_key": "template_label"}
    return Compose(
        [
            SplitNoised(**keys),
            MeasureGraind(**keys),
            LabelStatisticsd(**keys, num_labels=ANATOMY.num_labels),
            AlignTemplated(labels=labels),
        ]
    )


def trained_renderer(ckpt_dir: str, **overrides: Any) -> ConfigParser:
    """The shipped inference config with trained weights in its `network_def`, ready to render."""
    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG.parent / "inference.json"))
    parser.update({"bundle_root": str(TRAIN_CONFIG.parent.parent), "ckpt_dir": ckpt_dir, **overrides})
    parser.parse()
    network = parser.get_parsed_content("network_def")
    LoadWeights(network, str(Path(ckpt_dir) / "model.pt"))(None)
    network.eval()
    return parser
