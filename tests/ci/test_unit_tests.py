"""The unit tests in the manner of the model zoo exist for every bundle and pass, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import package
import pytest
from bundle_cases import entries
from helpers import ROOT

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
    with pytest.raises(ValueError, match="bundle: unheard_of has no case in ci/bundle_cases.py"):
        entries("unheard_of", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_unit_tests_pass(file):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "ci"), str(ROOT)))}
    command = [sys.executable, str(FOLDER / file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\nOK" in done.stderr
