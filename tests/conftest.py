"""Shared fixtures: a tiny phantom cohort and a way to run a bundle config in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from custom.networks import StructDiffUNet
from custom.phantom import make

ROOT = Path(__file__).resolve().parent.parent
BUNDLE, SEG_BUNDLE = (ROOT / "bundles" / name for name in ("structdiff_cardiac", "structdiff_seg_cal"))
CONFIGS = BUNDLE / "configs"
TINY = {"network_def#channels": [8, 8], "network_def#condition_channels": 4, "spacing_mm": [3.0, 3.0, 3.0]}
TINY_TRAINING = {
    **TINY,
    "roi_size": [24, 24, 24],
    "roi_margin": 8,
    "samples_per_epoch": 4,
    "max_epochs": 2,
    "val_interval": 1,
    "val_cases": 1,
    "sampling_steps": 2,
}


LOCK = """
import os, sys, time
from custom.records import lock_folder
lock_folder(sys.argv[1])
if os.fork() == 0:  # a worker that outlives its parent
    os.close(1)
    time.sleep(60)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def other_process_at_work(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process, with a forked worker, that holds the lock of a folder."""
    command = [sys.executable, "-c", LOCK, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms of 58^3 at 2.5 mm: two for training, one for validation, one for test."""
    directory = tmp_path_factory.mktemp("cohort")
    make(str(directory), subjects=4, shape=(58, 58, 58), spacing_mm=2.5, validation_fraction=0.25, test_fraction=0.25)
    return directory


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that adds 10 HU of noise to the prior: enough to see where things land."""
    network = StructDiffUNet(num_labels=11, channels=(8, 8), condition_channels=4)
    network.moments.set_table(torch.full_like(network.moments.table, 0.1))
    directory = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), directory / "model.pt")
    return directory


def workflow_of(bundle: Path) -> Callable[..., ConfigWorkflow]:
    """How to build and initialise a workflow from config names and overrides; logging to MLflow is left out."""

    def build(*names: str, workflow_type: str = "train", mlflow: bool = False, **overrides: Any) -> ConfigWorkflow:
        torch.set_num_threads(1)
        result = ConfigWorkflow(
            config_file=[str(bundle / "configs" / name) for name in names],
            meta_file=str(bundle / "configs/metadata.json"),
            logging_file=str(bundle / "configs/logging.conf"),
            workflow_type=workflow_type,
            bundle_root=str(bundle),
            **overrides,
        )
        if not mlflow:
            for section in ("train", "validate"):
                if section in result.parser.config:
                    handlers = result.parser[section]["handlers"]
                    result.parser[section]["handlers"] = [h for h in handlers if "MLFlow" not in str(h)]
        result.initialize()
        return result

    return build


@pytest.fixture
def workflow() -> Callable[..., ConfigWorkflow]:
    """Workflows of the generator."""
    return workflow_of(BUNDLE)


@pytest.fixture
def seg_workflow() -> Callable[..., ConfigWorkflow]:
    """Workflows of the segmenter."""
    return workflow_of(SEG_BUNDLE)
