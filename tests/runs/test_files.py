"""Files are absent or whole, and known by what they hold."""

import json
from dataclasses import dataclass

import pytest

from custom.runs.files import content_hash, file_hashes, plain_values, replace_file, write_json, write_table


@dataclass
class Options:
    lengths_mm: tuple[float, float]
    name: str


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})

    def fail(part):
        part.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(tmp_path / "a.json", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_table_has_a_column_for_every_key_and_empty_cells_for_what_is_not_known(tmp_path):
    rows = [{"case": "a, b", "accepted": False}, {"case": "c", "accepted": True, "retries": 3, "dice": 0.1 + 0.2}]
    rows += [{"retries": 0, "dice": float("nan"), "case": "NA"}]
    write_table(tmp_path / "new/table.csv", rows)
    lines = ["case,accepted,retries,dice", '"a, b",False,,', "c,True,3,0.30000000000000004", "NA,,0,", ""]
    assert (tmp_path / "new/table.csv").read_bytes() == "\r\n".join(lines).encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]


def test_hashes_tell_apart_where_parts_end():
    assert content_hash(b"ab", b"c") != content_hash(b"a", b"bc")
    assert content_hash(b"ab") == content_hash(b"ab")
    assert len(content_hash(b"")) == 16


def test_plain_values_are_what_json_gives_back():
    value = {1: Options((1.0, 2.0), "x"), "n": None}
    assert plain_values(value) == json.loads(json.dumps(plain_values(value)))
    assert plain_values(value) == {"1": {"lengths_mm": [1.0, 2.0], "name": "x"}, "n": None}


def test_hashes_of_files_follow_their_content(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("same")
    cases = [{"label": str(tmp_path / "a"), "case": "x"}, {"label": str(tmp_path / "b")}]
    first = file_hashes(cases, ["label", "image"])
    assert list(first) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert len(set(first.values())) == 1
    (tmp_path / "a").write_text("changed")
    assert file_hashes(cases, ["label", "image"]) != first
