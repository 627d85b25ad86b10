"""Stages killed without warning, and on disks that fail: the same command again ends as if nothing had happened."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal

import pytest
from stages import STAGES, Runs, results

logger = logging.getLogger(__name__)
KILLS = 2
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
def test_a_stage_killed_at_a_random_moment_goes_on_to_the_same_results(runs, stage, tmp_path):
    whole = runs.undisturbed(stage)
    moments = random.Random(f"{SEED} {stage}")
    for kill in range(KILLS):
        out = tmp_path / str(kill)
        share = moments.uniform((kill + 0.05) / KILLS, (kill + 0.9) / KILLS)
        killed = runs.run(stage, out, kill_after_s=share * whole.cpu_s)
        made = len(results(out)) if out.exists() else 0
        logger.info("%s: exit %d at %.0f %%, %d files there", stage, killed.code, 100 * share, made)
        assert killed.code == -signal.SIGPROF or share > 0.8, killed.said[-4000:]
        goes_on(runs, stage, out)


REMEDIES = ("make room", "choose another", "choose a folder")


def refused(result, out):
    """The last line that a user reads names the file or folder and the remedy."""
    assert result.code > 0, result.said[-4000:]
    line = result.said.strip().splitlines()[-1]
    assert str(out) in line, line
    assert any(remedy in line for remedy in REMEDIES), line


@pytest.mark.slow
@stages
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_that_fails_is_named_and_the_stage_goes_on_when_it_is_mended(runs, stage, tmp_path, code):
    whole, out = runs.undisturbed(stage), tmp_path / "out"
    number = random.Random(f"{SEED} {stage} {code}").randint(1, whole.writes)
    refused(runs.run(stage, out, failing_write=number, code=code), out)
    goes_on(runs, stage, out)


@pytest.mark.slow
@stages
def test_files_that_may_not_grow_are_named(runs, stage, tmp_path):
    """A limit of the operating system: it also holds for what MLflow's database writes."""
    runs.undisturbed(stage)
    sizes = sorted({path.stat().st_size for path in (runs.whole / stage).rglob("*") if path.is_file()})
    limit = random.Random(f"{SEED} {stage}").choice(sizes[1:]) - 1
    refused(runs.run(stage, tmp_path / "out", most_bytes=limit), tmp_path)
    goes_on(runs, stage, tmp_path / "out")


@pytest.mark.slow
@stages
def test_a_file_where_the_folder_should_be_is_named(runs, stage, tmp_path):
    runs.undisturbed(stage)
    (tmp_path / "out").write_text("mine")
    refused(runs.run(stage, tmp_path / "out"), tmp_path)
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    goes_on(runs, stage, tmp_path / "out")
