"""The notebook of the first hour: well formed, true to configs and guides (fast), and it runs from the top (slow)."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
import notebook as runner
import pytest
from helpers import BUNDLE, ROOT, SEG_BUNDLE
from shell_shims import config_files, merged, option, recorders

NOTEBOOK = nbformat.read(runner.NOTEBOOK, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
BASH = [cell.source.split("\n", 1)[1] for cell in CODE if cell.source.startswith("%%bash -eo pipefail\n")]
PYTHON = [cell.source for cell in CODE if not cell.source.startswith("%%")]
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
OF_RUN = {"bundle_root", "config_file"}
MAX_BYTES = 1_500_000


def test_it_is_a_valid_notebook_of_moderate_size():
    nbformat.validate(NOTEBOOK)
    assert runner.NOTEBOOK.stat().st_size <= MAX_BYTES
    assert len(BASH) + len(PYTHON) == len(CODE), "every cell of bash must stop at an error: %%bash -eo pipefail"


def test_cells_ran_once_from_the_top_and_without_error():
    counts = [cell.execution_count for cell in CODE]
    assert counts in ([None] * len(CODE), list(range(1, len(CODE) + 1)))
    kinds = {output.output_type for cell in CODE for output in cell.outputs}
    assert "error" not in kinds
    assert not any(output.get("name") == "stderr" for cell in CODE for output in cell.outputs)


def test_nothing_in_it_tells_of_the_machine_that_ran_it():
    text = [part for cell in CODE for output in cell.outputs for part in [output.get("text", "")]]
    text += [str(v) for c in CODE for o in c.outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
    found = re.findall(r"(?<![\w.<:/])/[\w.-]+/[\w./-]+", "\n".join([*text, *PYTHON, *BASH]))
    assert found == []


def test_what_it_imports_of_the_project_is_there():
    nodes = [node for source in PYTHON for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    wanted = [(node.module, alias.name) for node in nodes if node.module.startswith("custom") for alias in node.names]
    assert len(wanted) >= 3
    assert [pair for pair in wanted if not hasattr(importlib.import_module(pair[0]), pair[1])] == []


def test_a_new_user_gets_a_phantom_and_a_folder_that_git_ignores():
    (settings,) = (cell for cell in PYTHON if cell.startswith("own_image ="))
    values = {}
    exec(settings, values)
    assert tuple(name for name in values if not name.startswith("__")) == runner.SETTINGS
    assert values["own_image"] is values["own_label"] is None
    assert values["output"].startswith("runs/")
    assert "/runs/" in (ROOT / ".gitignore").read_text().split()


def test_commands_name_files_run_ids_and_options_that_exist(tmp_path):
    record = tmp_path / "record"
    record.mkdir()
    recorders(tmp_path / "bin", "python")
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(record), "SEED": "0"}
    env |= {"OUT": "out", "IMAGE": "ct.nii.gz", "LABEL": "label.nii.gz"}
    env |= {"GENERATOR": str(BUNDLE), "SEGMENTER": str(SEG_BUNDLE)}
    for source in BASH:
        subprocess.run(["bash", "-eo", "pipefail", "-c", source], env=env, cwd=tmp_path, check=True)
    calls = [path.read_text().split("\0")[1:-1] for path in record.iterdir()]
    assert len(calls) == sum(source.count("python -m ") for source in BASH) >= 8
    for call in calls:
        if call[:3] != ["-m", "monai.bundle", "run"]:
            assert call[1:3] in (["custom.phantom", "make"], ["custom.study", "check"])
            continue
        files = config_files(option(call, "config_file"))
        assert all(path.is_file() for path in files), files
        config = merged(option(call, "config_file"))
        assert (call[3] if not call[3].startswith("--") else "run") in config
        used = {part[2:] for part in call if part.startswith("--")} - OF_RUN
        assert [name for name in used if name.split("#")[0] not in config] == []


def test_links_lead_to_files_and_headings():
    for link in re.findall(r"\]\((?!https://)([^)\s]+)\)", PROSE):
        target, _, anchor = link.partition("#")
        place = (ROOT / "docs" / target).resolve()
        assert place.exists(), link
        headings = re.findall(r"^#+ (.*)$", place.read_text(), re.M) if anchor else []
        names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in names, link


def test_a_misspelt_setting_is_named():
    with pytest.raises(ValueError, match="own_imgae: no such setting; the settings cell has own_image, own_label"):
        runner.main("unused.ipynb", own_imgae="ct.nii.gz")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"own_image": "absent.nii.gz"}, "name both, or neither"),
        ({"own_image": "absent.nii.gz", "own_label": "absent.nii.gz"}, "there is no file absent.nii.gz"),
    ],
)
def test_a_wrong_path_in_the_settings_is_named(changed, said, monkeypatch):
    notebook = nbformat.read(runner.NOTEBOOK, as_version=4)
    runner.with_settings(notebook, changed)
    place = next(k for k, cell in enumerate(notebook.cells) if cell.source.startswith("own_image ="))
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        exec(
            "import os, sys\nfrom pathlib import Path\n"
            + "\n".join(c.source for c in notebook.cells[place : place + 2])
        )


@pytest.mark.slow
def test_it_runs_from_the_top_and_writes_into_its_folder_only(tmp_path):
    def files() -> set[Path]:
        places = (BUNDLE, SEG_BUNDLE, ROOT / "docs")
        return {path for place in places for path in place.rglob("*") if path.suffix != ".lock"}

    before = files()
    runner.main(str(tmp_path / "run.ipynb"), timeout_s=1800, output=str(tmp_path / "hour"))
    assert files() == before
    written = nbformat.read(tmp_path / "run.ipynb", as_version=4)
    pictures = [o for cell in written.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5
    assert (tmp_path / "hour/synthetic/report.html").is_file()
    assert len(json.loads((tmp_path / "hour/synthetic/datalist.json").read_text())["training"]) >= 1
    labels = (tmp_path / "hour/cal/evaluation/labels.csv").read_text()
    assert "coronary arteries" in labels
