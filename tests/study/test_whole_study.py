"""A study of five phantoms from its command, and one that is killed again and again: the same files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from custom.phantom.cohort import make
from helpers import ROOT

OPTIONS = ["--count", "2", "--epochs", "3", "--workers", "1", "--spacing_mm", "1.5"]
KILLS = 5


def start(cases: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "custom.study", "run", str(cases), str(folder), *OPTIONS]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def results(folder: Path) -> dict[str, bytes]:
    """What a study is for; not logs, times and the store of MLflow."""
    patterns = (
        "masks/masks/*",
        "synthetic/images/*",
        "synthetic/labels/*",
        "synthetic/confidence/*",
        "*/evaluation/labels.csv",
    )
    return {str(p.relative_to(folder)): p.read_bytes() for pattern in patterns for p in folder.glob(pattern)}


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(p.relative_to(folder)): torch.load(p, weights_only=True) for p in folder.glob("*/models/*.pt")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a stage with its study on Linux alone")
def test_a_study_killed_five_times_leaves_the_files_of_one_that_was_not(tmp_path):
    make(str(tmp_path / "cases"), subjects=5, shape=(64, 64, 64), spacing_mm=2.25, seed=3)
    (tmp_path / "cases/datalist.json").unlink()
    began = time.monotonic()
    said = finish(start(tmp_path / "cases", tmp_path / "whole"))
    seconds = time.monotonic() - began
    assert "all 11 stages are done" in said
    assert (tmp_path / "whole/synthetic/report.html").is_file()
    rng = random.Random(7)
    for _ in range(KILLS):
        process = start(tmp_path / "cases", tmp_path / "killed")
        time.sleep(rng.uniform(10, seconds / 3))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(tmp_path / "cases", tmp_path / "killed"))
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert len(results(tmp_path / "whole")) > 5
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert (
        whole.keys()
        == killed.keys()
        == {f"{n}.pt" for n in ("cal/models/pretrained", "cal/models/model", "real_only/models/model")}
    )
    assert all(torch.equal(tensor, killed[name][key]) for name, state in whole.items() for key, tensor in state.items())
    again = finish(start(tmp_path / "cases", tmp_path / "whole"))
    assert "11 stages, 0 of them to do" in again
    listed = json.loads((tmp_path / "whole/datalist.json").read_text())
    assert [len(listed[section]) for section in ("training", "validation", "test")] == [3, 1, 1]
