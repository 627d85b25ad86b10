"""Every command that the guides and the model cards print is well formed (fast) and runs (slow)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import package
import pytest
import torch
from bundle_cases import make_data
from helpers import ROOT
from monai.bundle import ConfigParser
from shell_shims import config_files, merged, option, recorders, small_python

from custom.phantom.cohort import make

BUNDLES = package.bundles()
CARDS = [bundle / "docs/README.md" for bundle in BUNDLES]
FIVE_CASES = ROOT / "docs/FIVE_CASES.md"
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", FIVE_CASES]
NOT_RUN = {
    "bash ci/real_input.sh": "needs a real CTA and a night",
    "bash ci/monailabel.sh": "is a check of its own, with an installation of its own",
    "source .venv-monailabel/bin/activate": "what ci/monailabel.sh does, with a user's folders",
}
"""How blocks begin that no test runs, with the reason."""


def blocks(document: Path) -> list[str]:
    """Fenced blocks of commands: in the guides those marked bash, in the cards those without a mark."""
    mark = "" if document in CARDS else "bash"
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)
    return [text for language, text in found if language == mark]


def environment(shims: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join((str(shims), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **more}


def sandbox(folder: Path) -> Path:
    """A copy of the checkout, without results, whose `.venv` is a stub for shims."""
    for name in ("bundles", "custom", "ci", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("eval", "models", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "cases").mkdir()
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f'export PATH="{folder}/.venv/bin:$PATH"\n')
    return folder


def add_fresh_weights(bundle: Path) -> None:
    parser = ConfigParser()
    parser.read_config(bundle / "configs/inference.json")
    (bundle / "models").mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), bundle / package.WEIGHTS)


def add_five_cases(folder: Path) -> None:
    """Phantoms under the names of the worked example."""
    make(str(folder / "made"), subjects=5, shape=(58, 58, 58), spacing_mm=2.5)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for number, path in enumerate(sorted((folder / "made" / kind).iterdir()), start=1):
            path.rename(folder / kind / f"{number}.nii.gz")


def bash(script: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def recorded(document: Path, tmp_path: Path) -> list[list[str]]:
    """Arguments of every program that the blocks of a document start, without running any."""
    record = tmp_path / "record"
    record.mkdir()
    where = sandbox(tmp_path / "sandbox") if document in GUIDES else document.parents[1]
    recorders(tmp_path / "shims", "python", "torchrun", "bash")
    recorders(where / ".venv/bin", "python", "ruff") if document in GUIDES else None
    text = "\n".join(block for block in blocks(document) if not block.startswith(tuple(NOT_RUN)))
    bash(text, where, environment(tmp_path / "shims", RECORD=str(record)))
    calls = [path.read_text().split("\0")[:-1] for path in record.iterdir()]
    return [[re.sub(f"^{re.escape(str(where))}/", "", part) for part in call] for call in calls]


@pytest.mark.parametrize("document", GUIDES + CARDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_files_run_ids_and_options_that_exist(document, tmp_path, monkeypatch):
    (tmp_path / "sandbox").mkdir()
    calls = recorded(document, tmp_path)
    assert len(calls) >= 4
    monkeypatch.chdir(ROOT if document in GUIDES else document.parents[1])
    for call in calls:
        if "monai.bundle" not in call or "run" not in call:
            continue
        value = option(call, "config_file").replace(f"{tmp_path}/sandbox/", "")
        assert all(path.is_file() for path in config_files(value)), value
        config, after = merged(value), call[call.index("run") + 1]
        assert (after if not after.startswith("--") else "run") in config, call
        used = {part[2:].split("=")[0].split("#")[0] for part in call if part.startswith("--")}
        known = {*config, "config_file", "bundle_root", "standalone", "nproc_per_node"}
        assert used <= known, used - known


def test_blocks_that_are_not_run_still_exist():
    printed = [block for document in GUIDES + CARDS for block in blocks(document)]
    assert all(any(block.startswith(beginning) for block in printed) for beginning in NOT_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_commands_of_the_guides_run(document, tmp_path):
    root = sandbox(tmp_path)
    for bundle in (root / "bundles").iterdir():
        add_fresh_weights(bundle)
    add_five_cases(root / "cases")
    small_python(root / ".venv/bin")
    for tool in ("ruff", "mypy", "black", "isort", "flake8"):
        (root / ".venv/bin" / tool).symlink_to(Path(sys.executable).parent / tool)
    stamp = "cat pyproject.toml ci/constraints.txt ci/setup.sh | sha256sum | cut -c1-16"
    (root / f".venv/structdiff-{bash(stamp, root, dict(os.environ)).strip()}").touch()
    text = "\n".join(block for block in blocks(document) if not block.startswith(tuple(NOT_RUN)))
    bash(text, root, environment(root / ".venv/bin", SCHEMA="absent"))
    if document.name == "README.md":
        assert (root / "runs/rendered/subject_038_from_subject_000.nii.gz").is_file()
        assert (root / "runs/synthetic/report.html").is_file()
        assert (root / "runs/demo/synthetic/report.html").is_file()
        assert (root / "dist/structdiff_cardiac.zip").is_file()
    if document == FIVE_CASES:
        assert (root / "runs/five/segmented/5_seg.nii.gz").is_file()
        assert "three real cases only" in (root / "runs/five/synthetic/report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parents[1].name)
def test_commands_of_the_card_run_in_the_folder_of_the_bundle(card, tmp_path):
    bundle = tmp_path / card.parents[1].name
    shutil.copytree(card.parents[1], bundle, ignore=shutil.ignore_patterns("eval", "models", "data"))
    shutil.copytree(ROOT / "custom", bundle / "custom", ignore=shutil.ignore_patterns("__pycache__"))
    make_data(bundle)
    (bundle / "data/synthetic").mkdir()
    cases = json.loads((bundle / "data/synthetic.json").read_text())["training"]
    cases = [{k: str(bundle / "data" / v) if isinstance(v, str) else v for k, v in case.items()} for case in cases]
    (bundle / "data/synthetic/datalist.json").write_text(json.dumps({"training": cases}))
    for folder, target in (("phantoms", "data"), ("synthetic", "data/synthetic")):
        if f"--output_dir {folder} " not in card.read_text():  # else a command of the card makes it
            (bundle / folder).symlink_to(bundle / target)
    for file in ("mask_1", "mask_2", "ct_label"):
        shutil.copy(bundle / "data/labels/subject_000.nii.gz", bundle / f"{file}.nii.gz")
    for file in ("ct", "ct_1", "ct_2"):
        shutil.copy(bundle / "data/images/subject_000.nii.gz", bundle / f"{file}.nii.gz")
    small_python(tmp_path / "bin")
    for block in blocks(card):
        for path in (bundle / "eval").rglob("resume.pt"):
            path.unlink()  # the next block starts another training
        bash(block, bundle, environment(tmp_path / "bin"))
