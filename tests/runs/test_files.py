"""Files are absent or whole; a folder belongs to one run."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT, other_process_at_work

from custom.runs.files import content_hash, file_hashes, plain_values, replace_file, write_json
from custom.runs.folders import claim_folder, lock_folder, unlock_folder


@dataclass
class Options:
    lengths_mm: tuple[float, float]
    name: str


def claim(folder, **provenance):
    return claim_folder(str(folder), name="run.json", provenance=provenance)


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})

    def fail(part):
        part.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(tmp_path / "a.json", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_hashes_tell_apart_where_parts_end():
    assert content_hash(b"ab", b"c") != content_hash(b"a", b"bc")
    assert content_hash(b"ab") == content_hash(b"ab")
    assert len(content_hash(b"")) == 16


def test_plain_values_are_what_json_gives_back():
    value = {1: Options((1.0, 2.0), "x"), "n": None}
    assert plain_values(value) == json.loads(json.dumps(plain_values(value)))
    assert plain_values(value) == {"1": {"lengths_mm": [1.0, 2.0], "name": "x"}, "n": None}


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


def test_hashes_of_files_follow_their_content(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("same")
    cases = [{"label": str(tmp_path / "a"), "case": "x"}, {"label": str(tmp_path / "b")}]
    first = file_hashes(cases, ["label", "image"])
    assert list(first) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert len(set(first.values())) == 1
    (tmp_path / "a").write_text("changed")
    assert file_hashes(cases, ["label", "image"]) != first


def test_a_folder_with_other_content_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.docx, ...\) and no run.json"):
        claim(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_second_run_into_one_folder_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    with other_process_at_work(tmp_path) as other:
        busy = rf"output_dir .*: process {other.pid} on \S+ is at work on part 0 of this run; wait until it has ended"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=busy):
                lock_folder(str(tmp_path))
        lock_folder(str(tmp_path), shard=1)  # another part
        unlock_folder(str(tmp_path), shard=1)
        other.kill()
        other.wait()
        lock_folder(str(tmp_path))  # nothing to clean up, although the worker of the other run still lives
        unlock_folder(str(tmp_path))


def test_a_lock_is_kept_by_its_process_until_it_is_given_back(tmp_path):
    lock_folder(str(tmp_path))
    lock_folder(str(tmp_path))  # the same process goes on

    def exit_code():
        take = "import sys; from custom.runs.folders import lock_folder; lock_folder(sys.argv[1])"
        return subprocess.run([sys.executable, "-c", take, str(tmp_path)], cwd=ROOT, capture_output=True).returncode

    assert exit_code() == 1
    unlock_folder(str(tmp_path))
    unlock_folder(str(tmp_path))
    assert exit_code() == 0


def test_a_locked_folder_can_still_be_claimed(tmp_path):
    lock_folder(str(tmp_path))
    assert claim(tmp_path, seed=0)["seed"] == 0
    unlock_folder(str(tmp_path))
