"""Which cases are still to be made."""

import gzip

import pytest
from custom.volumes.finished import unfinished


def test_unfinished_are_the_cases_without_a_complete_result(tmp_path):
    cases = [{"case": name} for name in ("done", "partial", "other_ending", "folder", "new")]
    (tmp_path / "done.nii.gz").write_bytes(WHOLE)
    (tmp_path / ".partial_7_partial.nii.gz").touch()
    (tmp_path / "other_ending.png").touch()
    (tmp_path / "folder.nii.gz").mkdir()
    assert [case["case"] for case in unfinished(cases, str(tmp_path))] == ["partial", "other_ending", "folder", "new"]
    none = unfinished(cases, str(tmp_path), done=lambda case, folder: case["case"] != "new" and folder == str(tmp_path))
    assert [case["case"] for case in none] == ["new"]


WHOLE = gzip.compress(bytes(range(256)) * 8)


@pytest.mark.parametrize(
    "damaged",
    [b"", b"no gzip" * 90, WHOLE[:-1], WHOLE[: len(WHOLE) // 2], gzip.compress(b"short")],
    ids=["empty", "no gzip", "one byte less", "half", "too short"],
)
def test_a_result_cut_short_is_named_and_made_again(tmp_path, caplog, damaged):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(damaged)
    assert unfinished([{"case": "a"}], str(tmp_path)) == [{"case": "a"}]
    assert f"{path} is damaged and is made again" in caplog.text


def test_everything_is_unfinished_in_a_folder_that_does_not_exist_yet(tmp_path):
    assert unfinished([{"case": "a"}], str(tmp_path / "new")) == [{"case": "a"}]


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_share_the_cases_out_and_leave_none(tmp_path, shards):
    cases = [{"case": str(number)} for number in range(5)]
    parts = [unfinished(cases, str(tmp_path), shard=k, shards=shards) for k in range(shards)]
    assert sorted(case["case"] for part in parts for case in part) == list("01234")


@pytest.mark.parametrize(("shard", "shards"), [(2, 2), (-1, 3)])
def test_a_shard_that_does_not_exist_is_refused(tmp_path, shard, shards):
    with pytest.raises(ValueError, match=f"shard: must be 0 to {shards - 1} of {shards} shards, got {shard}"):
        unfinished([], str(tmp_path), shard=shard, shards=shards)
