"""The unit tests in the manner of the model zoo exist for every bundle and pass, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import package
import pytest
from helpers import ROOT
from unit_tests.bundle_cases import entries
from unpacked import SCHEMA, unpack

FOLDER = ROOT / "ci/unit_tests"
NAMES = [path.name for path in package.bundles()]


@pytest.mark.parametrize("name", NAMES)
def test_every_bundle_has_unit_tests(name):
    for suffix in ("", "_dist"):
        assert (FOLDER / f"test_{name}{suffix}.py").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_run_by_a_unit_test(name, tmp_path):
    cases = entries(name, tmp_path)
    used = {config for entry in cases.values() for config in entry.configs}
    written = {path.name for path in (ROOT / "bundles" / name / "configs").glob("*.json")}
    assert {config for config in written - used if not config.startswith("preset_")} == {"metadata.json"}
    text = "".join(path.read_text() for path in FOLDER.glob(f"test_{name}*.py"))
    missing = [case for case in cases if f'("{case}")' not in text]
    assert not missing


def test_a_bundle_without_a_case_is_named(tmp_path):
    with pytest.raises(ValueError, match="bundle: unheard_of has no case in ci/unit_tests/bundle_cases.py"):
        entries("unheard_of", tmp_path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Both bundles below `models/`, and their unit tests in `ci/unit_tests`, as they lie in the model zoo."""
    root = tmp_path_factory.mktemp("zoo")
    package.build(str(root / "dist"), without_weights=True)
    for name in NAMES:
        unpack(root / f"dist/{name}.zip", root / "models", SCHEMA)
    shutil.copytree(FOLDER, root / "ci/unit_tests", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_unit_tests_pass_in_the_tree_of_the_zoo_and_need_nothing_else(zoo, file):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, f"ci/unit_tests/{file}"]
    done = subprocess.run(command, cwd=zoo, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\nOK" in done.stderr


ZOO_STYLE = {
    "pyproject.toml": "[tool.black]\nline-length = 120\ntarget-version = ['py37', 'py38', 'py39']\n",
    "setup.cfg": "[isort]\nknown_first_party = models\nprofile = black\nline_length = 120\n",
}
"""What the model zoo's own files say of style; there `custom` is somebody else's package."""


@pytest.mark.parametrize("tool", ["isort", "black"])
def test_style_of_what_is_packed_is_the_zoos_in_its_own_tree(zoo, tool):
    for name, text in ZOO_STYLE.items():
        (zoo / name).write_text(text)
    options = ["--skip-magic-trailing-comma"] if tool == "black" else []
    command = [sys.executable, "-m", tool, *options, "--check", "models", "ci"]
    done = subprocess.run(command, cwd=zoo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
