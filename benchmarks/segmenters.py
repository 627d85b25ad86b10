"""Which stock network learns most from few cases in little time on a CPU?

    python benchmarks/segmenters.py --work_dir runs/segmenters

Every arm trains with `train.json` on the same four phantoms for the same number of steps and is tested on eight others.
"""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from common import RESULTS, known, machine
from custom.runs.files import write_json
from downstream import COLUMNS, SEGMENTER, SEGMENTER_OPTIONS, bundle_run, listing, once, phantoms

EPOCHS, TRAINING, TEST = 60, 4, 8  # epochs of 16 steps
NETWORKS: dict[str, dict[str, Any]] = {
    "SegResNet, 8 filters": {
        "_target_": "SegResNet",
        "spatial_dims": 3,
        "init_filters": 8,
        "in_channels": 1,
        "out_channels": 11,
        "blocks_down": [1, 2, 2, 4],
        "blocks_up": [1, 1, 1],
        "norm": ["INSTANCE", {"affine": True}],
    },
    "DynUNet, 8 filters": {
        "_target_": "DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 11,
        "kernel_size": [3, 3, 3, 3],
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2],
        "filters": [8, 16, 32, 64],
        "norm_name": ["INSTANCE", {"affine": True}],
        "res_block": True,
    },
}


def arm(work: Path, name: str, training: str, test: str) -> dict[str, float]:
    """Train and test one network."""
    folder = work / name.split(",")[0]
    options = {k: v for k, v in SEGMENTER_OPTIONS.items() if not k.startswith("network_def")}
    shared = {"ckpt_dir": folder / "models", "network_def": NETWORKS[name], "seed": 0, **options}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    bundle_run(
        "training",
        SEGMENTER,
        ["train.json"],
        datalists=[training],
        max_epochs=EPOCHS,
        output_dir=folder / "training",
        **{"validate#dataset#data": []},
        **shared,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    bundle_run(
        "evaluating",
        SEGMENTER,
        ["train.json", "evaluate.json"],
        datalists=[test],
        output_dir=folder / "evaluation",
        **shared,
    )
    metrics = known(json.loads((folder / "evaluation/metrics.json").read_text()))
    weights = torch.load(folder / "models/model.pt", weights_only=True)
    return {
        **{column: metrics.get(key, float("nan")) for column, key in COLUMNS.items()},
        "training, CPU s": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "parameters, million": sum(value.numel() for value in weights.values()) / 1e6,
    }


def main(work_dir: str = "runs/segmenters", networks: Sequence[str] = tuple(NETWORKS)) -> None:
    """Run what is missing; when all is there, print the table and write benchmarks/results/segmenters.json.

    Args:
        work_dir: cache of everything.
        networks: those to run, some of `NETWORKS`; several processes may take different ones.
    """
    work = Path(work_dir).resolve()
    cases = phantoms(work, seed=900, training=TRAINING, test=TEST)
    training, test = (listing(work / f"{name}.json", cases[name], (name,)) for name in ("training", "test"))
    results = {name: work / f"{name}.json" for name in NETWORKS}
    for name in networks:
        once(results[name], lambda: write_json(results[name], arm(work, name, training, test)))  # noqa: B023
    if not all(path.exists() for path in results.values()):
        return
    runs = {name: json.loads(path.read_text()) for name, path in results.items()}
    write_json(RESULTS / "segmenters.json", {"machine": machine(), "steps": EPOCHS * 16, "runs": runs})
    columns = list(next(iter(runs.values())))
    print("| arm | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in runs.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(main)
