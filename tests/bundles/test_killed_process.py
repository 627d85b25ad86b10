"""Processes killed without warning, at random moments: what they leave is whole, and going on gives the same result."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import BUNDLE, CONFIGS, ROOT, TINY, TINY_TRAINING, network_of_prior

KILLS = 5
START_SECONDS = 4.0


def start(config: str, run_id: str, overrides: dict) -> subprocess.Popen:
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(CONFIGS / config)]
    command += ["--bundle_root", str(BUNDLE), *(f"--{key}={value}" for key, value in overrides.items())]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(config: str, run_id: str, overrides: dict) -> float:
    begun = time.monotonic()
    assert start(config, run_id, overrides).wait() == 0
    return time.monotonic() - begun


def kill_often(config: str, run_id: str, overrides: dict, seconds: float, check) -> int:
    """Start, kill after a random share of the time a whole run takes, check; say how often it was still running."""
    moments, killed = random.Random(0), 0
    for _ in range(KILLS):
        process = start(config, run_id, overrides)
        try:
            process.wait(moments.uniform(min(START_SECONDS, seconds / 2), seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        check()
    return killed


def the_same_volumes(config: str, run_id: str, overrides: dict, folder: Path) -> list[str]:
    """Names of the volumes that a run killed again and again ends with: those, and the values, of a whole run."""
    whole, broken = folder / "whole", folder / "broken"
    seconds = finish(config, run_id, {**overrides, "output_dir": str(whole)})

    def written(directory: Path) -> dict[str, np.ndarray]:
        paths = sorted(path for path in directory.rglob("*.nii.gz") if not path.name.startswith("."))
        # a partial file raises here
        return {str(path.relative_to(directory)): np.asarray(nib.load(path).dataobj) for path in paths}

    overrides = {**overrides, "output_dir": str(broken)}
    assert kill_often(config, run_id, overrides, seconds, lambda: written(broken)) > 0, "every run ended unharmed"
    finish(config, run_id, overrides)
    expected, resumed = written(whole), written(broken)
    assert list(resumed) == list(expected)
    for name, volume in expected.items():
        np.testing.assert_array_equal(resumed[name], volume, err_msg=name)
    return list(expected)


@pytest.mark.slow
def test_sampling_killed_at_random_moments_leaves_whole_files_and_the_same_volumes(cohort, tmp_path):
    torch.save(network_of_prior().state_dict(), tmp_path / "model.pt")
    template = {key: str(cohort / f"{key}s/subject_000.nii.gz") for key in ("image", "label")}
    overrides = {
        **TINY,
        "target_masks": [str(path) for path in sorted((cohort / "labels").glob("*.nii.gz"))],
        "templates": [template],
        "ckpt_dir": str(tmp_path),
        "sampling_steps": 4,
    }
    volumes = the_same_volumes("inference.json", "run", overrides, tmp_path)
    assert len(volumes) == len(overrides["target_masks"])


@pytest.mark.slow
def test_mask_generation_killed_at_random_moments_leaves_whole_files_and_the_same_volumes(cohort, tmp_path):
    overrides = {"reference_datalist": str(cohort / "datalist.json"), "count": 6, "with_image": "true"}
    volumes = the_same_volumes("generate_masks.json", "generating", overrides, tmp_path)
    assert len(volumes) == 6 + 6 + 2  # masks, images, prepared references


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_with_the_same_weights(cohort, tmp_path):
    def overrides(name: str) -> dict:
        directory = tmp_path / name
        return {
            **TINY_TRAINING,
            "max_epochs": 6,
            "dataset_dir": str(cohort),
            "output_dir": str(directory),
            "ckpt_dir": str(directory / "models"),
        }

    def weights(name: str) -> dict[str, torch.Tensor]:
        state = torch.load(tmp_path / name / "resume.pt", weights_only=False)
        return {f"{part}.{key}": value for part in ("network", "ema") for key, value in state[part].items()}

    def check() -> None:
        if (tmp_path / "broken/resume.pt").exists():
            weights("broken")  # a partial checkpoint raises here

    seconds = finish("train.json", "training", overrides("whole"))
    assert kill_often("train.json", "training", overrides("broken"), seconds, check) > 0
    finish("train.json", "training", overrides("broken"))
    expected, resumed = weights("whole"), weights("broken")
    assert list(resumed) == list(expected)
    for key, value in expected.items():
        assert torch.equal(resumed[key], value), key
    best = [torch.load(tmp_path / name / "models/model.pt", weights_only=True) for name in ("whole", "broken")]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())
