"""Stages killed without warning, and on disks that fail: the same command again ends as if nothing had happened."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import signal

import pytest
from stages import STAGES, Runs, results, saved_files

logger = logging.getLogger(__name__)
SEED = int(os.environ.get("STRUCTDIFF_FAILURES_SEED", 0))
"""Of the moments of all failures: another one draws others."""
stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    started = Runs(cohort, tmp_path_factory.mktemp("whole"))
    yield started
    started.close()


def goes_on(runs, stage, out):
    """The command again, undisturbed: results are byte for byte those of a run that never failed."""
    again = runs.run(stage, out)
    assert again.code == 0, again.said[-4000:]
    expected, found = results(runs.whole / stage), results(out)
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    left = [path for path in out.rglob(".*") if path.name.startswith((".part_", ".mlflow_"))]
    assert left == []


@pytest.mark.slow
@stages
@pytest.mark.parametrize("measure", ["saves", "time"])
def test_a_stage_killed_at_a_random_moment_goes_on_to_the_same_results(runs, stage, tmp_path, measure):
    """Once just after it saved a file, of which the first says what the run is; once at any time."""
    whole, moments = runs.undisturbed(stage), random.Random(f"{SEED} {stage} {measure}")
    if measure == "saves":
        moment = {"kill_after_saves": moments.randint(min(2, whole.saves), max(1, whole.saves - 1))}
    else:
        moment = {"kill_after_s": moments.uniform(0.05, 0.8) * whole.cpu_s}
    killed = runs.run(stage, tmp_path / "out", **moment)
    there = [str(path.relative_to(tmp_path / "out")) for path in saved_files(tmp_path / "out")]
    logger.info(
        "%s: exit %d at %s of %d, %.1f s; there: %s", stage, killed.code, moment, whole.saves, whole.cpu_s, there
    )
    assert killed.code == -signal.SIGKILL, killed.said[-4000:]
    goes_on(runs, stage, tmp_path / "out")


def refused(result, out, remedy):
    """The last line that a user reads names the file or folder and the remedy; nothing is left half-written."""
    assert result.code > 0, result.said[-4000:]
    line = result.said.strip().splitlines()[-1]
    logger.info("%s", line)
    assert str(out) in line, line
    assert re.search(remedy, line), line
    assert [path for path in out.rglob(".part_*")] == []


FULL, READ_ONLY = "make room", "make the folder writable, or choose another (output_dir|ckpt_dir|confidence_table)"


@pytest.mark.slow
@stages
@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, FULL), (errno.EROFS, READ_ONLY)], ids=["full", "read-only"]
)
def test_a_disk_that_fails_is_named_and_the_stage_goes_on_when_it_is_mended(runs, stage, tmp_path, code, remedy):
    whole, out = runs.undisturbed(stage), tmp_path / "out"
    number = random.Random(f"{SEED} {stage} {code}").randint(1, whole.writes)
    refused(runs.run(stage, out, failing_write=number, code=code), out, remedy)
    goes_on(runs, stage, out)


@pytest.mark.slow
@stages
def test_files_that_may_not_grow_are_named(runs, stage, tmp_path):
    """A limit of the operating system: it also holds for what MLflow's database writes."""
    runs.undisturbed(stage)
    files = [path for path in (runs.whole / stage).rglob("[!.]*") if path.is_file()]
    limit = random.Random(f"{SEED} {stage}").choice(sorted({path.stat().st_size for path in files})) - 1
    refused(runs.run(stage, tmp_path / "out", most_bytes=limit), tmp_path / "out", "make room|raise the limit")
    goes_on(runs, stage, tmp_path / "out")


@pytest.mark.slow
@stages
def test_a_folder_that_is_a_file_or_cannot_be_written_is_named(runs, stage, tmp_path):
    runs.undisturbed(stage)
    out = tmp_path / "out"
    out.write_text("mine")
    refused(runs.run(stage, out), out, "must be the name of a folder, or of one that can be made")
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir(mode=0o555)
    refused(runs.run(stage, out, bound_by_modes=True), out, READ_ONLY)
    assert list(out.iterdir()) == []
