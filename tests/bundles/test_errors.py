"""A bundle that is put together wrongly says so: versions, folders, ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import custom
import package
import pytest
from helpers import TINY, TINY_TRAINING, fails_with


@pytest.mark.parametrize("bundle", package.bundles(), ids=lambda path: path.name)
def test_every_run_of_our_code_compares_versions_first(bundle):
    files = {path.name: json.loads(path.read_text()) for path in (bundle / "configs").glob("*.json")}
    assert files["metadata.json"]["custom_version"] == custom.__version__
    items = [item for file in files.values() for item in file.items()]
    runs = [steps for key, steps in items if isinstance(steps, list) and key.endswith(("ing", "run"))]
    ours = [steps for steps in runs if len(steps) > 1 or not steps[0].startswith("@")]
    stock = files["inference.json"]
    if "custom." not in json.dumps(stock):  # the segmenter is used without our code
        ours.remove(stock["run"])
    assert ours
    assert all(steps[0] == "@versions" for steps in ours), [steps for steps in ours if steps[0] != "@versions"]


@pytest.mark.parametrize(
    ("configs", "run_id"),
    [
        (("train.json",), "training"),
        (("train.json", "multi_gpu_train.json"), "training"),
        (("train.json", "evaluate.json"), "evaluating"),
        (("inference.json",), "run"),
        (("inference.json", "synthesize.json"), "synthesizing"),
        (("inference.json", "synthesize.json", "calibrate.json"), "calibrating"),
        (("inference.json", "synthesize.json", "measure_set.json"), "measuring"),
        (("generate_masks.json",), "generating"),
    ],
)
def test_an_older_custom_beside_a_newer_bundle_is_said_before_anything_runs(
    workflow, tmp_path, monkeypatch, configs, run_id
):
    monkeypatch.setattr(custom, "__version__", "0.0.1")
    run = workflow(
        *configs, workflow_type=None, run_id=run_id, initialize=[], output_dir=str(tmp_path / "out"), device="cpu"
    )
    with fails_with("custom: version 0.0.1 was imported from"):
        run.run()
    assert not (tmp_path / "out").exists()


OLD_CHECK = """
from pathlib import Path
import custom

def check_version(*, needed):
    if needed != custom.__version__:
        raise ValueError(
            f"custom: version {custom.__version__} was imported from {Path(__file__).parent}, the bundle's "
            f"metadata.json needs custom_version {needed}; use the folder custom/ that came with the bundle"
        )
"""


@pytest.mark.parametrize("bundle", package.bundles(), ids=lambda path: path.name)
def test_a_custom_of_the_old_shape_beside_a_new_bundle_is_refused_by_name(bundle, tmp_path):
    """Before version 0.3 its modules lay side by side, without rooms."""
    old = tmp_path / "custom"
    old.mkdir()
    (old / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (old / "checks.py").write_text(OLD_CHECK)
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--bundle_root", str(bundle)]
    command += ["--config_file", str(bundle / "configs/train.json"), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"custom: version 0.2.0 was imported from {old}" in done.stderr
    assert f"needs custom_version {custom.__version__}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_run_id_is_named(workflow, tmp_path):
    with pytest.raises(ValueError, match="run ID 'trainning' doesn't exist in the config"):
        workflow("train.json", run_id="trainning", output_dir=str(tmp_path)).run()


@pytest.mark.parametrize(
    ("config", "run_id", "reason"),
    [
        ("train.json", "training", "nowhere/data/datalist.json"),
        ("inference.json", "run", "target_masks"),
        ("generate_masks.json", "generating", "nowhere/data/datalist.json"),
    ],
)
def test_a_wrong_bundle_root_names_the_file_that_is_not_there(workflow, tmp_path, config, run_id, reason):
    tiny = {"train.json": TINY_TRAINING, "inference.json": TINY, "generate_masks.json": {}}[config]
    run = workflow(config, workflow_type=None, run_id=run_id, **tiny)
    run.parser.update({"bundle_root": str(tmp_path / "nowhere"), "output_dir": str(tmp_path / "out")})
    run.initialize()
    with fails_with(reason):
        run.run()
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
