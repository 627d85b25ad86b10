"""Stages run in order, skipped when done, gone on with after kills; a failure says what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom.runs.command_line import check_command_line
from custom.runs.locks import lock_folder
from custom.study.bundles import find_bundles, typed
from custom.study.planning import plan
from custom.study.running import StageError, _Clock, run_stages, say_plan, unfinished
from custom.study.stages import Settings, Stage, Study, trained
from helpers import other_process

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def stage(root, name, needs=(), code=APPEND, seconds=1.0, text="x"):
    return Stage(name, f"makes {name}", ["-c", code, str(root / name), text], root / name, seconds, needs)


def cases_of(training):
    """Section -> cases, so many of them to learn from."""
    return {"training": [{}] * training, "validation": [{}], "test": [{}]}


@pytest.fixture
def datalist(tmp_path):
    (tmp_path / "datalist.json").write_text("{}")
    return tmp_path / "datalist.json"


def content(root, *names):
    return [(root / name).read_text() for name in names]


def test_stages_run_once_and_again_only_where_something_changed(tmp_path, datalist):
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", ["a"]), stage(tmp_path, "c")]
    run_stages(stages, tmp_path, datalist)
    run_stages(stages, tmp_path, datalist)
    assert content(tmp_path, "a", "b", "c") == ["x", "x", "x"]
    (tmp_path / "a").unlink()
    run_stages(stages, tmp_path, datalist)
    assert content(tmp_path, "a", "b", "c") == ["x", "xx", "x"], "what works on a missing result is run again"
    run_stages([stages[0], stages[1], stage(tmp_path, "c", text="y")], tmp_path, datalist)
    assert content(tmp_path, "a", "b", "c") == ["x", "xx", "xy"], "another command is another stage"
    datalist.write_text('{"training": []}')
    run_stages(stages, tmp_path, datalist)
    assert content(tmp_path, "a", "b") == ["xx", "xxx"], "other cases are another study"


def test_a_failed_stage_is_named_with_its_last_words_log_and_command(tmp_path, datalist):
    code = "import sys; print('a table'); print('ERROR: x.nii.gz: is no scan; export it'); print('later'); sys.exit(3)"
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", code=code), stage(tmp_path, "c")]
    with pytest.raises(StageError) as error:
        run_stages(stages, tmp_path, datalist)
    said = str(error.value)
    assert said.startswith("b: stopped after")
    assert "x.nii.gz: is no scan; export it" in said
    assert str(tmp_path / "logs/b.log") in said
    assert typed(stages[1].command) in said
    assert "a table" in (tmp_path / "logs/b.log").read_text()
    assert not (tmp_path / "c").exists()
    assert [s.name for s in unfinished(stages, tmp_path, "other")] == ["a", "b", "c"]
    stages[1] = stage(tmp_path, "b")
    run_stages(stages, tmp_path, datalist)
    assert content(tmp_path, "a", "b", "c") == ["x", "x", "x"], "what was done is kept"


def test_the_cause_is_that_of_this_run_of_a_stage(tmp_path, datalist):
    with pytest.raises(StageError, match="first reason; mend it"):
        run_stages([stage(tmp_path, "a", code="import sys; sys.exit('ERROR: first reason')")], tmp_path, datalist)
    with pytest.raises(StageError, match="second reason; mend it"):
        run_stages([stage(tmp_path, "a", code="import sys; sys.exit('second reason')")], tmp_path, datalist)
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(StageError, match="SIGKILL ended it, as it does where memory is short") as error:
        run_stages([stage(tmp_path, "a", code=code)], tmp_path, datalist)
    assert "\n" not in str(error.value), "the last line is the whole of it"


def test_where_an_input_has_changed_nothing_is_done_and_one_that_is_missing_is_named(tmp_path, datalist):
    own = tmp_path / "own.json"
    own.write_text("1")
    for text, made in (("1", "x"), ("1", "x"), ("2", "xx")):
        own.write_text(text)
        run_stages([stage(tmp_path, "a")], tmp_path, datalist, own)
        assert content(tmp_path, "a") == [made]
    own.unlink()
    with pytest.raises(FileNotFoundError, match="own.json: there is no such file"):
        run_stages([stage(tmp_path, "a")], tmp_path, datalist, own)


def test_a_stage_that_writes_nothing_is_no_success(tmp_path, datalist):
    with pytest.raises(StageError, match="a: has ended without writing"):
        run_stages([stage(tmp_path, "a", code="pass")], tmp_path, datalist)


def test_a_second_study_in_the_folder_is_refused(tmp_path, datalist):
    at_work = pytest.raises(RuntimeError, match="is at work on part 0 of this run; wait until it has ended")
    with other_process(lambda: lock_folder(str(tmp_path))), at_work:
        run_stages([stage(tmp_path, "a")], tmp_path, datalist)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a stage with its study on Linux alone")
def test_a_killed_study_takes_its_stage_with_it_and_goes_on(tmp_path, datalist):
    slow = "import sys, time, os; open(sys.argv[1] + '.pid', 'w').write(str(os.getpid())); time.sleep(60)"
    study = os.fork()  # not started: it need not import what this process has
    if study == 0:
        try:
            arguments = ["-c", slow, str(tmp_path / "a")]
            run_stages([Stage("a", "a", arguments, tmp_path / "a", 1.0)], tmp_path, tmp_path / "datalist.json")
        finally:
            os._exit(1)
    pid = tmp_path / "a.pid"
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    os.kill(study, signal.SIGKILL)
    os.waitpid(study, 0)
    for _ in range(100):
        if not Path(f"/proc/{pid.read_text()}").exists() or _is_zombie(pid.read_text()):
            break
        time.sleep(0.1)
    else:
        os.kill(int(pid.read_text()), signal.SIGKILL)
        pytest.fail("the stage went on without its study")
    run_stages([stage(tmp_path, "a")], tmp_path, datalist)
    assert content(tmp_path, "a") == ["x"]


def _is_zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_time_left_follows_what_is_done_and_what_was_taken_before(tmp_path):
    first, second, third = (stage(tmp_path, name, seconds=100.0) for name in "abc")
    clock = _Clock([first, second, third])
    clock.add(first, 200.0)
    assert clock.said(second, 50.0, 0.0, None) == "2 of 3 b, about 2 min left; the whole about 6 min"
    assert clock.said(second, 60.0, 0.0, 0.25) == "2 of 3 b, 25% done, about 3 min left; the whole about 6 min"
    assert clock.said(second, 60.0, 0.5, 0.75) == "2 of 3 b, 75% done, about 60 s left; the whole about 4 min"
    assert clock.said(second, 4000.0, 0.0, None) == "2 of 3 b, about 17 min left; the whole about 20 min"


def test_the_share_of_a_training_is_read_from_its_log(tmp_path):
    log = tmp_path / "log"
    assert trained(log) is None
    log.write_text("Epoch: 1/4, Iter: 20/40 -- loss\nno\n")
    assert trained(log) == pytest.approx(0.125)
    log.write_text(log.read_text() + "INFO - Epoch: 3/4, Iter: 40/40 -- train_loss: 1.0")
    assert trained(log) == pytest.approx(0.75)


def test_larger_cases_and_finer_masks_are_planned_to_take_longer(tmp_path):
    def planned(voxels, spacing_mm=0.8):
        label = tmp_path / f"{voxels}.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros((voxels,) * 3, np.uint8), np.diag([1.0, 1, 1, 1])), label)
        (tmp_path / "damaged.nii.gz").write_text("no volume")
        damaged = {"label": str(tmp_path / "damaged.nii.gz")}
        cases = {"training": [{"label": str(label)}], "validation": [damaged], "test": [{}]}
        study = Study(find_bundles(), tmp_path / "d.json", tmp_path, Settings(spacing_mm=spacing_mm), cases)
        assert study.megavoxels == pytest.approx(voxels**3 / 1e6)
        assert study.field_ml == pytest.approx(voxels**3 / 1e3)
        return {one.name: one.seconds for one in plan(study)}

    small, large, coarse = planned(40), planned(90), planned(90, 1.5)
    for name in ("masks", "images"):
        assert small[name] < coarse[name] < large[name]


@pytest.mark.parametrize("finetune", [0, 2])
def test_every_command_of_the_plan_is_one_that_the_bundles_know(tmp_path, finetune):
    settings = Settings(count=3, epochs=9, finetune=finetune)
    sizes = cases_of(3)
    stages = plan(Study(find_bundles(), tmp_path / "datalist.json", tmp_path, settings, sizes))
    names = [s.name for s in stages]
    assert len(set(names)) == len(names)
    assert ("generator" in names) == bool(finetune)
    for number, one in enumerate(stages):
        assert set(one.needs) <= set(names[:number]), "a stage works on what is there before it"
        assert one.seconds > 0
        if "monai.bundle" in one.command:
            check_command_line(["monai.bundle", *one.command[2:]])
            given = dict(zip(one.command[4::2], one.command[5::2], strict=True))
            assert all(Path(file).is_file() for file in _listed(given["--config_file"]))
    if not finetune:
        return
    tuned = [s.name for s in stages if str(tmp_path / "generator/models") in s.command]
    assert tuned == ["generator", "confidence", "images", "measures"]


def test_a_painted_study_needs_no_weights_and_no_calibration(tmp_path):
    case = {"image": "a.nii.gz", "label": "b.nii.gz"}
    pairs = {section: [case, case] for section in ("training", "validation", "test")}
    study = Study(find_bundles(), tmp_path / "datalist.json", tmp_path, Settings(mode="painted"), pairs)
    stages = plan(study)
    assert "confidence" not in [s.name for s in stages]
    for one in (s for s in stages if s.name in ("images", "measures")):
        check_command_line(["monai.bundle", *one.command[2:]])
        given = dict(zip(one.command[4::2], one.command[5::2], strict=True))
        assert given["--mode"] == "painted"
        assert not {"--ckpt_dir", "--confidence_table"} & set(given)
        assert set(one.needs) <= {"masks", "images"}
    assert study.inputs()[1:] == [study.bundles.segmenter / "models/model.pt", *[Path(p) for p in [*case.values()] * 6]]


def segmenter_starts(tmp_path, settings, overrides=None):
    """Stages that are given the shipped segmenter's weights, or their folder."""
    own = None
    if overrides is not None:
        own = tmp_path / "own.json"
        own.write_text(json.dumps(overrides))
    case = {"image": "a.nii.gz", "label": "b.nii.gz"}
    cases = {section: [case] * 2 for section in ("training", "validation", "test")}
    study = Study(find_bundles(overrides=own), tmp_path / "datalist.json", tmp_path, settings, cases)
    shipped = study.bundles.segmenter / "models"
    assert (shipped / "model.pt" in study.inputs()) == (study.shipped is not None)
    return [s.name for s in plan(study) if {str(shipped), str(shipped / "model.pt")} & set(s.command)]


def test_both_segmenters_start_from_the_shipped_weights_which_are_measured_too(tmp_path):
    assert segmenter_starts(tmp_path, Settings()) == ["pretraining", "real_only", "evaluation_shipped"]
    same_labels = {"anatomy#10#components": 3, "spacing_mm": [1.2, 1.2, 1.2]}
    assert segmenter_starts(tmp_path, Settings(), same_labels) == ["pretraining", "real_only", "evaluation_shipped"]


@pytest.mark.parametrize("overrides", [{"anatomy#10#name": "veins"}, {"network_def#init_filters": 16}])
def test_segmenters_of_other_labels_or_another_network_start_from_nothing(tmp_path, overrides):
    assert segmenter_starts(tmp_path, Settings(), overrides) == []


def test_segmenters_start_from_nothing_where_it_is_asked_for(tmp_path):
    assert segmenter_starts(tmp_path, Settings(pretrained=False)) == []
    with pytest.raises(ValueError, match="pretrained: must be True, .* or False, from nothing; got 'no'"):
        Settings(pretrained="no")


def test_a_mode_that_no_study_has_and_training_of_no_network_are_refused():
    with pytest.raises(ValueError, match="mode: must be one of template, painted, got 'mask_only'"):
        Settings(mode="mask_only")
    with pytest.raises(ValueError, match="finetune: must be 0 in mode painted, which uses no network .* got 2"):
        Settings(mode="painted", finetune=2)


def _listed(config):
    return json.loads(config.replace("'", '"')) if config.startswith("[") else [config]


def test_a_set_that_cannot_be_measured_is_not(tmp_path):
    few = plan(Study(find_bundles(), tmp_path / "d.json", tmp_path, Settings(), cases_of(1)))
    assert "measures" not in [s.name for s in few]


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("epochs", 2), ("finetune", -1), ("workers", 1.5)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be a whole number, at least"):
        Settings(**{name: value})


def test_a_voxel_size_out_of_range_is_refused_by_name():
    with pytest.raises(ValueError, match="spacing_mm: must be 0.5 to 3.0, got 8"):
        Settings(spacing_mm=8)


def test_the_plan_shows_each_command_as_it_could_be_typed(tmp_path, caplog):
    caplog.set_level("INFO")
    sizes = cases_of(3)
    stages = plan(Study(find_bundles(), tmp_path / "datalist.json", tmp_path, Settings(), sizes))
    say_plan(stages, stages[2:])
    assert f"{len(stages)} stages, {len(stages) - 2} of them to do" in caplog.text
    line = next(line for line in caplog.messages if "run synthesizing" in line).strip()
    assert '--config_file "[' in line
    echo = f"python() {{ printf '%s\\n' \"$@\"; }}; {line}"
    printed = subprocess.run(["bash", "-c", echo], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == list(stages[2].command)
