"""Files are absent or whole, and known by what they hold."""

import errno
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import pytest
from custom.runs.files import (
    content_hash,
    differences,
    file_hashes,
    named_folder,
    plain_values,
    read_json,
    remove_leftovers,
    replace_file,
    write_json,
    write_table,
)


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


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.EFBIG, r"raise the limit of the size of files \(ulimit -f\)"),
        (errno.ENOTDIR, "move the file away that lies in its place"),
        (errno.EIO, "make room or mend the disk there"),
    ],
)
def test_what_cannot_be_written_is_named_with_a_remedy_for_its_reason(tmp_path, code, remedy):
    def fail(part):
        raise OSError(code, os.strerror(code), str(part))

    refusal = f"{os.strerror(code)}; nothing was written, {remedy}, or choose another ckpt_dir"
    with pytest.raises(OSError, match=refusal) as caught:
        replace_file(tmp_path / "model.pt", fail, option="ckpt_dir")
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / "model.pt"))
    with pytest.raises(OSError, match=f"{os.strerror(code)}; {remedy}, or choose another shard") as caught:
        with named_folder(tmp_path, "shard"):
            fail(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path))


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


def test_damaged_json_is_named_with_what_is_wrong_and_the_remedy(tmp_path):
    for content, reason in (
        (b'{"a": 1', "Expecting"),
        (b"\xff\xfe", "codec"),
        (b"[1]", "one JSON object"),
        (b"", "value"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"a.json: is damaged \(.*{reason}.*\); make it anew"):
            read_json(tmp_path / "a.json", "make it anew")
    with pytest.raises(ValueError, match=r"is damaged \(Is a directory\); make it anew"):
        read_json(tmp_path, "make it anew")


def test_differences_are_named_by_the_innermost_key():
    before = {"seed": 0, "anatomy": {"1": {"weight": 2, "name": "x"}, "2": {}}, "sizes": [1, 2]}
    now = {"seed": 0, "anatomy": {"1": {"weight": 3, "name": "x"}, "2": {}}, "sizes": [1, 3], "more": None}
    assert differences(before, before) == {}
    expected = {"anatomy#1#weight": (2, 3), "sizes": ([1, 2], [1, 3]), "more": ("not set", None)}
    assert differences(before, now) == expected


def test_what_killed_processes_left_is_removed_and_what_is_at_work_stays(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, old = f".part_{platform.node()}_{ended.stdout.strip()}_", ".part_elsewhere_1_old"
    ours, other = f".part_{platform.node()}_{os.getpid()}_", ".part_elsewhere_1_new"
    (tmp_path / "masks").mkdir()
    for name in (f"{dead}a", f"masks/{dead}b", f"masks/{ours}c", other, old, "kept.json"):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / old, (1e9, 1e9))
    (tmp_path / f"masks/{dead}link").symlink_to("/nowhere")
    remove_leftovers(tmp_path)
    assert (tmp_path / f"masks/{dead}b").exists()
    remove_leftovers(tmp_path, below=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"masks", f"masks/{ours}c", other, "kept.json"}
    remove_leftovers(tmp_path / "absent", below=True)


def test_json_holds_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"mean": float("nan"), "rows": [(1.5, float("inf"))], 3: {"x": -float("inf")}})
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {"mean": None, "rows": [[1.5, None]], "3": {"x": None}}
