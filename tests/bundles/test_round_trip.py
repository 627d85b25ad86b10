"""A bundle as a user meets it: built, downloaded from a server, and run from three places without any checkout."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import package
import pytest
import torch
from helpers import ROOT
from monai.bundle import ConfigParser
from unit_tests.bundle_cases import entries

pytestmark = pytest.mark.slow

NAMES = [path.name for path in package.bundles()]
LIMIT_SECONDS = 300
"""On two cores that do nothing else."""
HIDE_CHECKOUT = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()]
sys.path = [p for p in sys.path if p != {str(ROOT)!r} and "editable" not in p]
"""
"""Takes an editable installation of the checkout from the path of a new process."""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args) -> None:
        """Drop the message."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """All bundles, packed with fresh weights of their default networks, on a local server: its URL and folder."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "custom", checkout / "custom")
    for bundle in package.bundles():
        copy = checkout / "bundles" / bundle.name
        shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("eval", "models"))
        parser = ConfigParser()
        parser.read_config(copy / "configs/inference.json")
        (copy / "models").mkdir()
        torch.save(parser.get_parsed_content("network_def").state_dict(), copy / package.WEIGHTS)
    package.build(str(checkout / "dist"), root=str(checkout))
    handler = functools.partial(Quiet, directory=str(checkout / "dist"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", checkout / "dist"
        http.shutdown()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory):
    """Run Python in a folder with nothing of this checkout on the path; `path` is put on it."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(HIDE_CHECKOUT)

    def run(*arguments: str, cwd: Path, path: Path | None = None, fails: bool = False) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (site, path)))), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
        assert (done.returncode != 0) == fails, done.stdout[-1500:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def bundle_dir(server, python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which MONAI downloads all bundles."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in NAMES:
        url = f"{server[0]}/{name}.zip"
        python("-m", "monai.bundle", "download", "--name", name, "--url", url, "--bundle_dir", ".", cwd=folder)
    return folder


def test_nothing_of_the_checkout_is_on_the_path(python, tmp_path):
    assert "No module named 'custom'" in python("-c", "import custom", cwd=tmp_path, fails=True)


def test_the_download_extracts_the_bundles_and_nothing_else(bundle_dir, server):
    assert {path.name for path in bundle_dir.iterdir()} == {*NAMES, *(f"{name}.zip" for name in NAMES)}
    for name in NAMES:
        shutil.copy(server[1] / "model_info.json", bundle_dir)
        assert package.check(str(bundle_dir / f"{name}.zip")).startswith(f"{name}.zip: {name} ")
    (bundle_dir / "model_info.json").unlink()


PLACES = {  # working directory and bundle root, from the folder that holds the bundles
    "inside": ("{name}", "."),
    "parent": (".", "{name}"),
    "unrelated": ("elsewhere", "../{name}"),
}


def run_everything(name: str, place: str, bundle_dir: Path, results: Path, python) -> None:
    """Run every entry point of a bundle on one process, from one place; results go to a folder of that place."""
    place_cwd, root = (text.format(name=name) for text in PLACES[place])
    folder = results / f"{name}_{place}"
    folder.mkdir()
    (folder / "data").symlink_to(results / "data")
    for case, entry in entries(name, folder).items():
        if case == "multi_gpu_train":
            continue
        options = [f"--{key}={value}" for key, value in entry.options.items()]
        configs = str([f"{root}/configs/{config}" for config in entry.configs])
        arguments = ["run", entry.run_id, "--config_file", configs, "--bundle_root", root]
        python("-m", "monai.bundle", *arguments, *options, cwd=bundle_dir / place_cwd)
        missing = [file for file in entry.writes if not (folder / file).is_file()]
        assert not missing, (name, place, case)


def test_every_entry_point_runs_from_inside_beside_and_elsewhere(bundle_dir, python, tmp_path):
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    (bundle_dir / "elsewhere").mkdir()
    make = f"from unit_tests.bundle_cases import make_data; from pathlib import Path; make_data(Path(r'{tmp_path}'))"
    shutil.copy(ROOT / "ci/unit_tests/bundle_cases.py", tmp_path)
    python("-c", make, cwd=tmp_path, path=bundle_dir / NAMES[0])
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run_everything, name, place, bundle_dir, tmp_path, python) for name in NAMES for place in PLACES
        ]
        for job in jobs:
            job.result()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - begun.ru_utime - begun.ru_stime
    assert seconds < 2 * LIMIT_SECONDS, "processor time on two cores"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workflow_type", ["train", "inference"])
def test_monai_loads_the_network_with_only_the_bundle_on_the_path(bundle_dir, python, tmp_path, name, workflow_type):
    code = f"""
import torch
from monai.bundle import load

network = load({name!r}, workflow_type={workflow_type!r}, bundle_dir={str(bundle_dir)!r}, device="cpu")
state = torch.load({str(bundle_dir / name / package.WEIGHTS)!r}, weights_only=True)
assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
import custom
print("custom from", custom.__file__)
"""
    assert f"custom from {bundle_dir / name}" in python("-c", code, cwd=tmp_path, path=bundle_dir / name)


def test_another_custom_in_the_working_directory_is_said(bundle_dir, python, tmp_path):
    shutil.copytree(bundle_dir / NAMES[0] / "custom", tmp_path / "custom")
    (tmp_path / "custom/__init__.py").write_text('__version__ = "0.0.1"\n')
    root = str(bundle_dir / NAMES[0])
    arguments = ["run", "training", "--config_file", f"{root}/configs/train.json", "--bundle_root", root]
    said = python("-m", "monai.bundle", *arguments, cwd=tmp_path, fails=True)
    assert f"custom: version 0.0.1 was imported from {tmp_path / 'custom'}" in said


def test_a_damaged_download_does_not_become_a_bundle(server, python, tmp_path):
    content = (server[1] / f"{NAMES[0]}.zip").read_bytes()
    (server[1] / "damaged.zip").write_bytes(content[: len(content) // 2])
    arguments = ["download", "--name", NAMES[0], "--url", f"{server[0]}/damaged.zip", "--bundle_dir", "."]
    said = python("-m", "monai.bundle", *arguments, cwd=tmp_path, fails=True)
    assert "BadZipFile" in said
    shutil.copy(server[1] / "model_info.json", tmp_path)
    with pytest.raises(ValueError, match="is damaged .*download it again"):
        package.check(str(tmp_path / f"{NAMES[0]}.zip"))


def test_a_bundle_without_weights_says_so(bundle_dir, python, tmp_path):
    name = "structdiff_cardiac"
    copy = tmp_path / name
    shutil.copytree(bundle_dir / name, copy, ignore=shutil.ignore_patterns("models", "eval"))
    mask = json.dumps([str(tmp_path / "mask.nii.gz")])
    (tmp_path / "mask.nii.gz").touch()
    arguments = ["run", "--config_file", "configs/inference.json", "--bundle_root", ".", "--mode", "mask_only"]
    said = python("-m", "monai.bundle", *arguments, f"--target_masks={mask}", cwd=copy, fails=True)
    assert "models/model.pt" in said
    assert "there is no such file; of weights: train first" in said
