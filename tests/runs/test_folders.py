"""A folder belongs to one run, which its options determine."""

import json
import os
import signal
from dataclasses import dataclass

import pytest
from custom.runs.folders import claim_folder
from custom.runs.locks import _LOCKS, TrainingPlace, lock_folder, unlock_folder
from helpers import other_process, succeeds_elsewhere
from ignite.engine import Engine
from monai.bundle import ConfigParser


@dataclass
class Options:
    lengths_mm: tuple[float, float]
    name: str


def claim(folder, **provenance):
    return claim_folder(str(folder), name="run.json", provenance=provenance)


def at_work(folder):
    return other_process(lambda: lock_folder(str(folder)))


def take_anew(folder):
    """Take the lock as a process does that was not forked from one that has it."""
    _LOCKS.clear()
    lock_folder(str(folder))


def test_the_same_run_goes_on_and_gets_the_same_provenance(tmp_path):
    first = claim(tmp_path / "new", seed=0, options=Options((1.0, 2.0), "x"))
    (tmp_path / "new" / "result.nii.gz").write_bytes(b"")
    assert claim(tmp_path / "new", seed=0, options=Options((1.0, 2.0), "x")) == first
    assert first["config_hash"] == json.loads((tmp_path / "new/run.json").read_text())["config_hash"]


def test_another_run_is_refused_and_told_what_differs(tmp_path):
    claim(tmp_path, seed=0, options=Options((1.0, 2.0), "x"))
    with pytest.raises(
        ValueError, match=r"run.json belongs to another run \(seed: 0 there, 1 now\); repeat its options"
    ):
        claim(tmp_path, seed=1, options=Options((1.0, 2.0), "x"))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; choose a folder"):
        claim(tmp_path / "file", seed=0)


def test_a_folder_with_other_content_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.docx, ...\) and no run.json"):
        claim(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_second_run_into_one_folder_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    with at_work(tmp_path) as other:
        busy = rf"output_dir .*: process {other} on \S+ is at work on part 0 of this run; wait until it has ended"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=busy):
                lock_folder(str(tmp_path))
        lock_folder(str(tmp_path), shard=1)  # another part
        unlock_folder(str(tmp_path), shard=1)
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        lock_folder(str(tmp_path))  # nothing to clean up, although the worker of the other run still lives
        unlock_folder(str(tmp_path))


def test_a_lock_is_kept_by_its_process_until_it_is_given_back(tmp_path):
    lock_folder(str(tmp_path))
    lock_folder(str(tmp_path))  # the same process goes on
    assert not succeeds_elsewhere(lambda: take_anew(tmp_path))
    unlock_folder(str(tmp_path))
    unlock_folder(str(tmp_path))
    assert succeeds_elsewhere(lambda: take_anew(tmp_path))


def test_a_locked_folder_can_still_be_claimed(tmp_path):
    lock_folder(str(tmp_path))
    assert claim(tmp_path, seed=0)["seed"] == 0
    unlock_folder(str(tmp_path))


# A run as a config describes it

CONFIG = {
    "output_dir": "out",
    "workers": 3,
    "seed": 5,
    "gate": {"max_dice": 0.9, "range": "$[1, @seed]"},
    "spacing_mm": None,
    "unused": 7,
    "listed": ["a.nii.gz"],
    "loader": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": "@seed", "kernel_size": 1},
    "used": "$(@output_dir, @workers, @gate, @spacing_mm, @listed, @loader)",
    "folder": {
        "_target_": "custom.runs.RunFolder",
        "output_dir": "@output_dir",
        "record": "run.json",
        "resolved": "$__local_refs",
        "leave_out": ["listed", "used"],
        "inputs": {"templates": "$[{'image': @image}]"},
        "known": {"version": "1.0"},
    },
}


def folder_of(tmp_path, **changes):
    """The folder of a run, after what the run is made of has been resolved."""
    (tmp_path / "image.nii.gz").write_bytes(b"voxels")
    more = {"output_dir": str(tmp_path / "out"), "image": str(tmp_path / "image.nii.gz")}
    parser = ConfigParser(CONFIG | more | changes)
    folder = parser.get_parsed_content("folder")
    parser.get_parsed_content("used")
    return folder


def test_provenance_is_all_options_that_were_used_but_for_places_and_names_left_out(tmp_path):
    with folder_of(tmp_path) as provenance:
        assert (tmp_path / "out/.shard_0.lock").exists()
    assert provenance["seed"] == 5
    assert provenance["gate"] == {"max_dice": 0.9, "range": [1, 5]}
    assert provenance["version"] == "1.0"
    assert list(provenance["templates"]) == [str(tmp_path / "image.nii.gz")]
    assert not {"output_dir", "workers", "unused", "listed", "loader", "used", "folder"} & set(provenance)
    assert json.loads((tmp_path / "out/run.json").read_text()) == provenance


def test_another_option_or_another_input_is_another_run_and_another_number_of_workers_is_not(tmp_path):
    with folder_of(tmp_path) as first:
        pass
    with folder_of(tmp_path, workers=8) as again:
        assert again == first
    with (
        pytest.raises(
            ValueError, match=r"another run \(gate#range: \[1, 5\] there, \[1, 6\] now; seed: 5 there, 6 now\)"
        ),
        folder_of(tmp_path, seed=6),
    ):
        pass
    folder = folder_of(tmp_path)
    (tmp_path / "image.nii.gz").write_bytes(b"others")
    with pytest.raises(ValueError, match="belongs to another run .templates: "), folder:
        pass


def test_a_nested_override_is_another_run_and_stands_in_the_record_alone(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = ["monai/bundle/__main__.py", "run", "--config_file", str(tmp_path / "config.json")]
    with folder_of(tmp_path) as first:
        (tmp_path / "out/result.nii.gz").write_bytes(b"")
    (tmp_path / "out/run.json").unlink()
    (tmp_path / "out/result.nii.gz").unlink()
    monkeypatch.setattr("sys.argv", command)
    with folder_of(tmp_path) as again:
        assert again == first, "a run from a command line is the same run"
    assert json.loads((tmp_path / "out/run.json").read_text())["config"]["loader#kernel_size"] == 1
    monkeypatch.setattr("sys.argv", [*command, "--loader#kernel_size", "3"])
    with pytest.raises(ValueError, match=r"another run \(loader#kernel_size: 1 there, 3 now\)"), folder_of(tmp_path):
        pass


def test_only_what_differs_is_told_by_its_name_and_shortened(tmp_path):
    rows = {str(k): {"name": f"label {k}", "components": 1} for k in range(20)}
    claim(tmp_path, anatomy=rows, files=["a" * 200], shift=float("nan"))
    (tmp_path / "result.nii.gz").write_bytes(b"")
    claim(tmp_path, anatomy=rows, files=["a" * 200], shift=float("nan"))
    rows["10"]["components"] = 3
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        claim(tmp_path, anatomy=rows, files=["b" * 200], shift=float("nan"))
    message = str(caught.value)
    assert "(anatomy#10#components: 1 there, 3 now; files: ['aaaa" in message
    assert "label 3" not in message
    assert len(message.replace(str(tmp_path), "")) < 350
    with pytest.raises(ValueError, match=r"anatomy#1#name: label 1 there, other now; .*; and 35 more\)"):
        claim(tmp_path, anatomy={k: {"name": "other"} for k in rows}, files=["a" * 200], shift=float("nan"))


def test_a_run_that_made_nothing_leaves_its_folder_to_another(tmp_path):
    def again(**provenance):
        return claim_folder(str(tmp_path), name="run.json", provenance=provenance, intermediate=["prepared"])

    first = again(seed=0)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/reference.nii.gz").write_bytes(b"of the options before")
    assert again(seed=0) == first
    assert (tmp_path / "prepared/reference.nii.gz").exists()
    with at_work(tmp_path), pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 there, 1 now\)"):
        again(seed=1)
    assert again(seed=1)["seed"] == 1
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1
    assert not (tmp_path / "prepared").exists()
    (tmp_path / "result.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"seed: 1 there, 0 now"):
        again(seed=0)


def test_nothing_is_claimed_before_the_work_begins_and_the_lock_ends_with_it(tmp_path):
    folder = folder_of(tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="amid the work"), folder:
        raise RuntimeError("amid the work")
    with (
        at_work(tmp_path / "out") as other,
        pytest.raises(RuntimeError, match=f"process {other} on .* is at work"),
        folder,
    ):
        pass


# A training's places


def place_of(folder, name="out", weights="models/model.pt"):
    return TrainingPlace(output_dir=str(folder / name), weights=str(folder / weights))


@pytest.mark.parametrize(
    ("theirs", "refusal"),
    [
        (("out", "others/model.pt"), r"output_dir \S+/out: process {} on \S+ is training in this folder; .*output_dir"),
        (("other", "models/model.pt"), r"\S+/models/model.pt: process {} on \S+ is training these weights; .*ckpt_dir"),
    ],
)
def test_a_second_training_into_one_place_is_refused_until_the_first_has_ended(tmp_path, theirs, refusal):
    with other_process(place_of(tmp_path, *theirs).take) as other:
        with pytest.raises(RuntimeError, match=refusal.format(other)):
            place_of(tmp_path).take()
        place_of(tmp_path, "third", "models/another.pt").run(trainer_of_one_step())
    place_of(tmp_path).run(trainer_of_one_step())


def trainer_of_one_step():
    trainer = Engine(lambda engine, batch: None)
    run = trainer.run
    trainer.run = lambda: run([0], max_epochs=1)
    return trainer


def test_a_place_is_given_back_also_by_a_training_that_fails(tmp_path):
    def fail():
        raise RuntimeError("amid the training")

    trainer = trainer_of_one_step()
    trainer.run = fail
    place = place_of(tmp_path)
    place.take()
    with pytest.raises(RuntimeError, match="amid the training"):
        place.run(trainer)
    assert succeeds_elsewhere(place_of(tmp_path).take)


def test_of_several_processes_the_first_takes_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    place_of(tmp_path).take()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_made_is_named_with_its_option(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(OSError, match="choose another ckpt_dir") as caught:
        place_of(tmp_path).take()
    assert caught.value.filename == str(tmp_path / "models")


@pytest.mark.parametrize("content", ['{"seed": 0', "[]", "\x00"])
def test_a_damaged_record_of_a_run_is_named_with_the_remedy(tmp_path, content):
    claim(tmp_path, seed=0)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"run.json: is damaged .*; choose another output_dir, or delete {tmp_path}"):
        claim(tmp_path, seed=0)


def test_what_killed_processes_left_of_a_run_is_removed_when_it_goes_on(tmp_path):
    with folder_of(tmp_path):
        pass
    left = tmp_path / "out/masks/.part_elsewhere_7_mask.nii.gz"
    left.parent.mkdir()
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    with folder_of(tmp_path):
        assert not left.exists()
