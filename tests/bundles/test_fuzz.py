"""Spoilt files and options, drawn by a seed, through every run of both bundles as `python -m monai.bundle run` does it.

    STRUCTDIFF_FUZZ_SEED=7 STRUCTDIFF_FUZZ_COUNT=300 pytest tests/bundles/test_fuzz.py

draws others. Each ends in an error whose last line names the file or option of the user and what would be right, and
leaves every file as it was; what may be meant is done instead, whole. There is no third way.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from custom.checks import cause_of
from custom.phantom.cohort import make
from fuzz.chains import RUNS, parser_of, start
from fuzz.draws import Case, draw
from fuzz.files import IMAGE
from fuzz.verdict import assert_clear, assert_whole, contents
from helpers import network_of_prior

COUNT = int(os.environ.get("STRUCTDIFF_FUZZ_COUNT", "240"))
SAMPLE = 8
"""Cases of the fast suite."""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, and nothing logged to MLflow, whose stores take seconds each; the log of a failed run may stay."""
    with pytest.MonkeyPatch.context() as patch:
        for place in (
            "custom.masks.summary.log_run",
            "custom.synthesis.report.log_run",
            "custom.evaluation.sets.log_run",
        ):
            patch.setattr(place, lambda *args, **options: None)
        patch.setattr("custom.runs.LogToMLFlow.__init__", lambda self, *args, **options: None)
        patch.setattr("custom.runs.LogToMLFlow.attach", lambda self, engine: None)
        patch.setattr(sys, "path", [*sys.path])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms and weights, in a folder that lies beside the user's."""
    root = tmp_path_factory.mktemp("fuzz") / "kept"
    make(
        str(root / "data"), subjects=4, shape=(48, 48, 48), spacing_mm=2.5, validation_fraction=0.25, test_fraction=0.25
    )
    shutil.rmtree(root / "data/clean", ignore_errors=True)
    parser = parser_of(RUNS["seg_training"])
    parser.update({name: value for name, value in RUNS["seg_training"].options.items() if "#" in name})
    torch.manual_seed(0)
    networks = {"models": network_of_prior(), "seg": parser.get_parsed_content("network_def")}
    for folder, network in networks.items():  # of the generator one of little noise, else limits reject what it renders
        (root / folder).mkdir()
        torch.save(network.state_dict(), root / folder / "model.pt")
    (root / "interrupted").mkdir()
    torch.save({}, root / "interrupted/resume.pt")
    return root


@pytest.fixture
def home(kept: Path) -> Path:
    """The user's folder as it was, always in one place, since records of runs hold paths."""
    return fresh(kept)


def fresh(kept: Path) -> Path:
    shutil.rmtree(kept.parent / "home", ignore_errors=True)
    shutil.copytree(kept, kept.parent / "home", copy_function=os.link)
    return kept.parent / "home"


@pytest.fixture(scope="module")
def complete(kept: Path) -> Path:
    """With masks, a confidence table and a synthetic set, which the runs themselves have made."""
    home = fresh(kept)
    start(RUNS["generating"], home, {**RUNS["generating"].options, "output_dir": "~/masks"}, {})
    table = {"confidence_table": "~/models/confidence.json"}
    start(RUNS["calibrating"], home, {**RUNS["calibrating"].options, **table}, {})
    start(RUNS["synthesizing"], home, {**RUNS["synthesizing"].options, "output_dir": "~/set"}, {})
    shutil.rmtree(kept)
    home.rename(kept)
    return kept


def judge(case: Case, home: Path) -> None:
    """Run a case and look at its end."""
    case.spoil(home)
    if case.in_file:
        (home / "mine.json").touch()
    options = {**RUNS[case.run].options, **case.options, **case.in_file}
    names = tuple(re.sub("^~", str(home), name) for name in case.names)
    before = contents(home)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start(RUNS[case.run], home, options, case.in_file)
    except (Exception, SystemExit) as error:
        after = contents(home)
        for found in (before, after):
            found.pop(str(home / "mine.json"), None)
        try:
            assert_clear(error, names, before, after)
        except AssertionError as unclear:
            raise AssertionError(f"{case.run}, {case.text}: {unclear}") from error
    else:
        assert not case.sure, f"{case.run}, {case.text}: done without a word"
        assert_whole(home / "out")


@pytest.mark.slow
@pytest.mark.parametrize("key", RUNS)
def test_good_files_and_options_are_no_obstacle(complete, home, key):
    """So that every refusal is due to what was spoilt."""
    start(RUNS[key], home, RUNS[key].options, {})
    assert_whole(home)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["rendering", "synthesizing", "generating"])
def test_a_folder_that_a_refused_run_has_claimed_is_free_for_another(complete, home, key):
    """So that a record of who was at work may stay."""
    run, image = RUNS[key], home / RUNS[key].images[0]
    whole = image.read_bytes()
    IMAGE["any_nan"](image, random.Random(0))
    with pytest.raises(RuntimeError) as refused:
        start(run, home, run.options, {})
    assert image.name in cause_of(refused.value)
    assert len(list((home / "out").glob("*.json"))) == 1
    image.unlink()
    image.write_bytes(whole)
    start(run, home, {**run.options, "seed": 7}, {})
    assert_whole(home / "out")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(COUNT))
def test_whatever_is_spoilt_is_refused_clearly_or_does_no_harm(complete, home, index):
    judge(draw(index, list(RUNS), home), home)


@pytest.mark.parametrize("index", range(SAMPLE))
def test_a_sample_of_the_above(kept, home, index):
    """Of runs that need nothing which others made."""
    cheap = [key for key, run in RUNS.items() if not re.search(r"\b(set|masks)/", str(run))]
    judge(draw(index, cheap, home), home)
