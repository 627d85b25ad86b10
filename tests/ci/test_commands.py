"""Every command that the documents print is well formed (fast) and runs (slow); what they say of the code is so."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import package
import pytest
import torch
from custom.phantom.cohort import make
from custom.study import __main__ as study
from custom.volumes.anatomy import Anatomy, Label
from helpers import ROOT
from monai.bundle import ConfigParser
from shell_shims import SMALL, config_files, merged, option, recorders, small_python
from test_rooms import MAY_IMPORT
from unit_tests.bundle_cases import make_data

BUNDLES = package.bundles()
CARDS = [bundle / "docs/README.md" for bundle in BUNDLES]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = GUIDES + CARDS
COMMANDS = {
    "README.md": 10,
    "CONTRIBUTING.md": 5,
    "docs/DATA.md": 1,
    "docs/DISTRIBUTION.md": 3,
    "docs/FIVE_CASES.md": 16,
    "docs/GENERATOR.md": 11,
    "docs/MASKS.md": 1,
    "docs/SEGMENTER.md": 6,
    "docs/SYNTHETIC_SET.md": 4,
    "bundles/structdiff_cardiac/docs/README.md": 26,
    "bundles/structdiff_seg_cal/docs/README.md": 12,
}
"""Document -> how many programs its blocks start, those of `NOT_RUN` left out; a loop counts every time."""
CHAINS = {
    "readme": ("README.md",),
    "contributing": ("CONTRIBUTING.md",),
    "five_cases": ("docs/FIVE_CASES.md",),
    "guides": ("docs/DATA.md", "docs/GENERATOR.md", "docs/MASKS.md", "docs/SYNTHETIC_SET.md", "docs/SEGMENTER.md"),
    "distribution": ("docs/DISTRIBUTION.md",),
}
"""Documents whose commands run in this order in one place: each needs what those before it wrote."""
WRITTEN = {
    "readme": (
        "runs/demo/synthetic/report.html",
        "runs/one/synthetic/report.html",
        "runs/chain/synthetic/report.html",
        "runs/chain/evaluation/labels.csv",
    ),
    "contributing": (),
    "five_cases": ("runs/five/segmented/5_seg.nii.gz",),
    "guides": (
        *("runs/rendered/subject_038_from_subject_000.nii.gz", "runs/evaluation/metrics.json"),
        *("runs/synthetic/set_metrics.json", "runs/synthetic/report.html", "runs/segmented/subject_039_seg.nii.gz"),
    ),
    "distribution": ("dist/structdiff_cardiac.zip",),
}
"""Files that a chain must leave."""
NOT_RUN = {
    "bash ci/real_input.sh": "needs a real CTA",
    "bash ci/monailabel.sh": "is a check of its own, with an installation of its own",
    "python -m custom.study": "tests/study runs it",
    "python3 -m venv .venv-dicom": "tests/benchmarks/test_dicom.py runs it",
    "source .venv-monailabel/bin/activate": "what ci/monailabel.sh does, with a user's folders",
    ".venv/bin/python benchmarks/same_results.py": "needs a second checkout and half an hour",
}
"""How blocks begin that no test runs, with the reason."""
SHIPPED = """
python -m custom.phantom make --output_dir runs/shipped --subjects 3
python -m monai.bundle run calibrating --bundle_root bundles/structdiff_cardiac \
    --config_file "['$C/inference.json','$C/synthesize.json','$C/calibrate.json']" \
    --template_datalist runs/shipped/datalist.json
"""
"""Makes what the generator is shipped with beside its weights."""
SHIPPED_CHAINS = ("readme", "five_cases")
"""Chains that render with the shipped weights."""
RUN_OPTIONS = {"config_file", "bundle_root", "standalone", "nproc_per_node"}
"""Options of a bundle run that no config need have."""
OTHER_OPTIONS = {
    *("name", "url", "bundle_dir", "nnodes", "slow", "without_weights"),
    *inspect.signature(make).parameters,
    *(
        name
        for command in (study.run, study.cross_validate, study.serve)
        for name in inspect.signature(command).parameters
    ),
}
"""Options of other programs: downloading, torchrun, ci/, custom.phantom and custom.study."""
NO_OPTIONS = {
    *("calibrating", "evaluating", "finalize", "generating", "imports", "initialize", "measuring", "pretraining"),
    *("reporting", "run", "synthesizing", "training"),
    *("coarse_network", "data", "deform_images", "guided", "inferer", "kept", "needed_weights", "network"),
    *("nothing", "num_labels", "one_piece_labels", "painted", "pair", "resampled", "run_state", "topology_measures"),
    *("two_piece_labels", "use_cuda", "volumes"),
}
"""Ids at the top of configs that are no options: what is run, and what follows from options."""


def named(document: Path) -> str:
    """Its path in the project."""
    return str(document.relative_to(ROOT))


def blocks(document: Path, language: str | None = None) -> list[str]:
    """Fenced blocks of a language; of commands when None: in the guides those marked bash, in the cards unmarked."""
    if language is None:
        language = "" if document in CARDS else "bash"
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)
    return [text for mark, text in found if mark == language]


def script(document: Path) -> str:
    """All commands of a document that a test runs."""
    return "\n".join(block for block in blocks(document) if not block.startswith(tuple(NOT_RUN)))


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def rows(document: Path, heading: str) -> list[list[str]]:
    """Cells of the tables below a heading, head and rule left out."""
    section = re.split(r"^#+ ", document.read_text().split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    tables = re.findall(r"^\|[ -:|]*-[ -:|]*\|\n((?:\|.*\|\n)+)", section, re.M)
    return [[cell.strip() for cell in line[1:-1].split("|")] for table in tables for line in table.splitlines()]


def environment(shims: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join((str(shims), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **more}


def stub(folder: Path) -> Path:
    """A folder for cases, and a `.venv` for shims."""
    (folder / "cases").mkdir(parents=True)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f'export PATH="{folder}/.venv/bin:$PATH"\n')
    return folder


def sandbox(folder: Path) -> Path:
    """A copy of the checkout, without results, whose `.venv` is a stub."""
    for name in ("bundles", "custom", "ci", "benchmarks", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("eval", "models", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return stub(folder)


def add_fresh_weights(bundle: Path, *, small: bool) -> None:
    """Random weights of the bundle's network, or of the small one that `small_python` runs."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs/inference.json")
    for key, value in SMALL.items():
        if small and key.startswith("network_def#") and key.split("#")[1] in parser["network_def"]:
            parser[key] = value
    (bundle / "models").mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), bundle / package.WEIGHTS)


def add_five_cases(folder: Path) -> None:
    """Phantoms under the names of the worked example."""
    make(str(folder / "made"), subjects=5, shape=(58, 58, 58), spacing_mm=2.5)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for number, path in enumerate(sorted((folder / "made" / kind).iterdir()), start=1):
            path.rename(folder / kind / f"{number}.nii.gz")


def bash(text: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", text], cwd=cwd, env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def recorded(document: Path, tmp_path: Path) -> list[list[str]]:
    """Arguments of every program that the blocks of a document start, without running any."""
    record = tmp_path / "record"
    record.mkdir()
    where = stub(tmp_path / "sandbox") if document in GUIDES else document.parents[1]
    recorders(tmp_path / "shims", "python", "torchrun", "bash")
    recorders(where / ".venv/bin", "python", "ruff") if document in GUIDES else None
    bash(script(document), where, environment(tmp_path / "shims", RECORD=str(record)))
    calls = [path.read_text().split("\0")[:-1] for path in record.iterdir()]
    return [[re.sub(f"^{re.escape(str(where))}/", "", part) for part in call] for call in calls]


def has(config: dict, path: str) -> bool:
    """Whether a config has an id such as "motion#coarse_mm"; of a row of `anatomy` any column of the table."""
    first, *more = path.split("#")
    if first == "anatomy" and len(more) == 2:
        return more[0] in config.get(first, {}) and more[1] in {field.name for field in dataclasses.fields(Label)}
    for part in (first, *more):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_files_run_ids_and_options_that_exist(name, tmp_path, monkeypatch):
    document = ROOT / name
    calls = recorded(document, tmp_path)
    assert len(calls) == COMMANDS[name]
    monkeypatch.chdir(ROOT if document in GUIDES else document.parents[1])
    for call in calls:
        files = [part for part in call if part.endswith((".py", ".sh"))]
        assert all(Path(file).is_file() for file in files), files
        if "monai.bundle" not in call or "run" not in call:
            continue
        value = option(call, "config_file").replace(f"{tmp_path}/sandbox/", "")
        assert all(path.is_file() for path in config_files(value)), value
        config, after = merged(value), call[call.index("run") + 1]
        assert (after if not after.startswith("--") else "run") in config, call
        used = {part[2:].split("=")[0] for part in call if part.startswith("--")} - RUN_OPTIONS
        assert [key for key in used if not has(config, key)] == []


def test_every_document_with_commands_has_a_place_in_a_chain():
    chained = [name for names in CHAINS.values() for name in names]
    assert sorted(chained) == sorted(named(path) for path in GUIDES if script(path))
    assert set(COMMANDS) == {*chained, *map(named, CARDS)}


def test_blocks_that_are_not_run_still_exist():
    printed = [block for document in DOCUMENTS for block in blocks(document)]
    assert all(any(block.startswith(beginning) for block in printed) for beginning in NOT_RUN)


def anchors(document: Path) -> set[str]:
    """What links to headings of a document end in, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)


@every_document
def test_no_line_is_longer_than_130_characters_but_for_an_address(document):
    lines = document.read_text().splitlines()
    assert [line for line in lines if len(re.sub(r"https?://\S+", "", line)) > 130] == []


@every_document
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\((?!https://)([^)\s]+)\)", prose(document)):
        target, _, anchor = link.partition("#")
        place = (document.parent / target).resolve() if target else document
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link


@every_document
def test_files_of_the_project_that_are_named_exist(document):
    found = re.findall(r"`(?:[\w./]+ )?((?:custom|tests|ci|benchmarks|docs)/[\w./*-]+)", prose(document))
    assert [name for name in found if "NAME" not in name and not any(ROOT.glob(name))] == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "FINDINGS.md"], ids=named)
def test_options_that_are_named_exist(document):
    """Findings apart: they tell what was run once, also with options of that day."""
    configs = [json.loads(path.read_text()) for bundle in BUNDLES for path in bundle.glob("configs/*.json")]
    text = "\n".join([prose(document), *(blocks(document, "text") if document in GUIDES else [])])
    found = {key for key in re.findall(r"(?<![\w-])--([a-z]\w*(?:#\w+)*)", text)} - RUN_OPTIONS - OTHER_OPTIONS
    assert [key for key in found if not any(has(config, key) for config in configs)] == []


def test_json_that_is_printed_can_be_read_and_its_label_map_is_one():
    printed = [json.loads(block) for document in GUIDES for block in blocks(document, "json")]
    tables = [Anatomy(content["anatomy"]) for content in printed if "anatomy" in content]
    assert [table.names for table in tables] == [["background", "lung", "trachea", "bronchi"]]


def test_python_that_is_printed_gives_the_table_above_it(tmp_path, capsys):
    method = ROOT / "docs/METHOD.md"
    (code,) = blocks(method, "python")
    (tmp_path / "printed.py").write_text(code)
    runpy.run_path(str(tmp_path / "printed.py"))
    (row,) = (cells for cells in rows(method, "Sampler") if cells[0].startswith("spread"))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == row[1:]


def test_the_anatomy_table_has_the_columns_and_labels_of_the_code():
    data = ROOT / "docs/DATA.md"
    columns = [cells[0].strip("`") for cells in rows(data, "The anatomy table")]
    assert columns == [field.name for field in dataclasses.fields(Label)]
    labels = {cells[k]: cells[k + 1] for cells in rows(data, "Labels") for k in (0, 2)}
    for bundle in BUNDLES:
        names = Anatomy(json.loads((bundle / "configs/train.json").read_text())["anatomy"]).names
        assert {k: v for k, v in labels.items() if k} == {str(k): name for k, name in enumerate(names)}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_option_is_listed_with_its_default(bundle):
    reference = ROOT / "docs/OPTIONS.md"
    whose = "Segmenter" if bundle.name == "structdiff_seg_cal" else "Generator"
    common = {cells[0].strip("`") for cells in rows(reference, "In several configs")}
    for path in sorted(bundle.glob("configs/*.json")):
        config = json.loads(path.read_text())
        changes_others = path.name.startswith(("preset", "multi_gpu", "train_coarse")) or path.name == "metadata.json"
        listed = [] if changes_others else rows(reference, f"{whose}: {path.name}")
        for name, default, _ in listed:
            assert has(config, name.strip("`")), (path, name)
            node = config
            for part in name.strip("`").split("#"):
                node = node[part]
            assert not default.startswith("`") or json.loads(default.strip("`")) == node, (path, name)
        tops = {key for key, v in config.items() if "#" not in key and "_target_" not in json.dumps(v)} - NO_OPTIONS
        known = common | {cells[0].strip("`").split("#")[0] for cells in listed}
        assert changes_others or tops <= known, (path, tops - known)


def test_the_rooms_are_those_of_the_code():
    table = [cells[0].strip("`") for cells in rows(ROOT / "CONTRIBUTING.md", "Rooms")]
    map_of_readme = re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(), re.M)
    assert sorted(table) == sorted(map_of_readme) == sorted(set(MAY_IMPORT) - {"checks"})


@pytest.mark.parametrize(("heading", "config"), [("Masks", "generate_masks"), ("Synthetic images", "synthesize")])
def test_the_limits_of_a_gate_are_those_of_its_config(heading, config):
    gate = json.loads((package.ROOT / f"bundles/structdiff_cardiac/configs/{config}.json").read_text())["gate"]
    printed = {cells[0].strip("`"): cells[1] for cells in rows(ROOT / "docs/MEASURES.md", heading) if len(cells) == 3}

    def text(limit):
        if isinstance(limit, str):
            return "the table's"
        return (
            "none" if limit is None else " to ".join(f"{v:g}" for v in (limit if isinstance(limit, list) else [limit]))
        )

    assert printed == {name: text(limit) for name, limit in gate.items()}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_commands_of_the_guides_run(chain, tmp_path):
    root = sandbox(tmp_path)
    for bundle in (root / "bundles").iterdir():
        add_fresh_weights(bundle, small=chain in SHIPPED_CHAINS)
    add_five_cases(root / "cases")
    small_python(root / ".venv/bin")
    for tool in ("ruff", "mypy", "black", "isort", "flake8"):
        (root / ".venv/bin" / tool).symlink_to(Path(sys.executable).parent / tool)
    stamp = "cat pyproject.toml ci/constraints.txt ci/setup.sh | sha256sum | cut -c1-16"
    (root / f".venv/structdiff-{bash(stamp, root, dict(os.environ)).strip()}").touch()
    env = environment(root / ".venv/bin", SCHEMA="absent", C="bundles/structdiff_cardiac/configs")
    if chain in SHIPPED_CHAINS:
        bash(SHIPPED, root, env)
    bash("\n".join(script(ROOT / name) for name in CHAINS[chain]), root, env)
    assert all((root / name).is_file() for name in WRITTEN[chain])
    if chain == "five_cases":
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
    for folder, target in (("phantoms", "data"), ("clinic", "data"), ("synthetic", "data/synthetic")):
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
