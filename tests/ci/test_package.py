"""The zip files of the bundles: what is in them, that they are the same every time, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import package
import pytest
import torch
from helpers import ROOT

NAMES = [path.name for path in package.bundles()]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bundles packed without weights."""
    directory = tmp_path_factory.mktemp("dist")
    package.build(str(directory), without_weights=True)
    return directory


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is packed, with weights of one tensor, to break."""
    shutil.copytree(ROOT / "custom", tmp_path / "custom", ignore=shutil.ignore_patterns("__pycache__"))
    for bundle in package.bundles():
        copy = tmp_path / "bundles" / bundle.name
        shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("eval", "models"))
        (copy / "models").mkdir()
        torch.save({"weight": torch.zeros(3)}, copy / "models/model.pt")
    return tmp_path


def build(checkout: Path, **options) -> Path:
    package.build(str(checkout / "dist"), root=str(checkout), **options)
    return checkout / "dist"


def rewrite(archive: Path, change) -> None:
    """Write a zip again with each entry changed by `change(entry, content)`; None drops it."""
    with zipfile.ZipFile(archive) as old:
        entries = [change(entry, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(archive, "w") as new:
        for entry, content in filter(None, entries):
            new.writestr(entry, content)


def test_bundles_are_found():
    assert "structdiff_cardiac" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_zip_has_one_top_folder_with_licence_card_configs_and_custom(dist, name):
    with zipfile.ZipFile(dist / f"{name}.zip") as archive:
        members = archive.namelist()
    assert {member.split("/")[0] for member in members} == {name}
    wanted = {"LICENSE", "docs/README.md", "docs/data_license.txt", "configs/metadata.json", "custom/__init__.py"}
    assert {f"{name}/{file}" for file in wanted} <= set(members)
    sources = [path for kind in ("*.py", "*.html", "*.css", "*.js") for path in (ROOT / "custom").rglob(kind)]
    committed = {f"{name}/custom/{path.relative_to(ROOT / 'custom')}" for path in sources}
    assert committed == {member for member in members if "/custom/" in member}
    configs = {f"{name}/configs/{path.name}" for path in (ROOT / "bundles" / name / "configs").iterdir()}
    assert configs <= set(members)


@pytest.mark.parametrize("name", NAMES)
def test_versioned_zip_is_the_same_file_and_listed_as_the_zoo_lists_it(dist, name):
    version = json.loads((ROOT / "bundles" / name / "configs/metadata.json").read_text())["version"]
    plain, versioned = dist / f"{name}.zip", dist / f"{name}_v{version}.zip"
    assert plain.read_bytes() == versioned.read_bytes()
    listed = json.loads((dist / "model_info.json").read_text())[f"{name}_v{version}"]
    assert set(listed) >= {"checksum", "source"}, "what monai.bundle reads"
    assert listed["size"] == versioned.stat().st_size <= package.MAX_ZIP_BYTES


def test_the_same_input_gives_the_same_bytes(checkout):
    first = {path.name: path.read_bytes() for path in build(checkout).iterdir()}
    for path in (checkout / "bundles").rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert {path.name: path.read_bytes() for path in build(checkout).iterdir()} == first


def test_weights_are_packed_and_left_out_on_request(checkout):
    for without, expected in ((False, 1), (True, 0)):
        with zipfile.ZipFile(build(checkout, without_weights=without) / f"{NAMES[0]}.zip") as archive:
            assert sum(name.endswith("models/model.pt") for name in archive.namelist()) == expected


def test_results_data_and_hidden_files_stay_out(checkout):
    bundle = checkout / "bundles" / NAMES[0]
    for name in ("eval/metrics.json", "data/patient.nii.gz", "mlflow.db", "models/.part_model.pt", "configs/.swp"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("private")
    with zipfile.ZipFile(build(checkout) / f"{NAMES[0]}.zip") as archive:
        assert not any(archive.read(name) == b"private" for name in archive.namelist())


def test_base_url_stands_before_the_file_names(checkout):
    folder = build(checkout, base_url="https://example.org/zoo/")
    for name, listed in json.loads((folder / "model_info.json").read_text()).items():
        assert listed["source"] == f"https://example.org/zoo/{name}.zip"


def test_missing_weights_are_named_with_both_remedies(checkout):
    (checkout / "bundles" / NAMES[0] / "models/model.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"models/model.pt is missing: train .* --without_weights"):
        build(checkout)


def test_weights_that_execute_code_or_are_a_checkpoint_are_refused(checkout):
    path = checkout / "bundles" / NAMES[0] / "models/model.pt"
    torch.save({"weight": Path("x")}, path)
    with pytest.raises(ValueError, match="weights_only=True"):
        build(checkout)
    torch.save({"network": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="no state dictionary"):
        build(checkout)


@pytest.mark.parametrize("place", ["configs/extra.json", "docs", "LICENSE"])
def test_symbolic_links_are_refused(checkout, place):
    path = checkout / "bundles" / NAMES[0] / place
    target = checkout / "elsewhere" / path.name
    target.parent.mkdir()
    if path.exists():
        path.rename(target)
    else:
        target.write_text("{}")
    path.symlink_to(target)
    with pytest.raises(ValueError, match="symbolic link"):
        build(checkout)


def test_a_file_beyond_the_limit_of_the_zoo_is_refused(checkout):
    with (checkout / "bundles" / NAMES[0] / "models/large.ts").open("wb") as file:
        file.truncate(package.MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="large.ts has 26214401 bytes; the model zoo takes at most 26214400"):
        build(checkout)


def test_configs_of_another_version_than_custom_are_not_packed(checkout):
    (checkout / "custom/__init__.py").write_text('__version__ = "0.0.1"\n')
    with pytest.raises(ValueError, match=r"custom_version is .*, but custom/__init__.py has 0.0.1; raise both"):
        build(checkout)


def test_a_folder_without_bundles_is_named(tmp_path):
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/__init__.py").touch()
    with pytest.raises(FileNotFoundError, match="root: no bundles"):
        package.build(str(tmp_path / "dist"), root=str(tmp_path))


@pytest.fixture
def archive(dist, tmp_path) -> Path:
    """A packed bundle with its list, to damage."""
    for name in (f"{NAMES[0]}.zip", "model_info.json"):
        shutil.copy(dist / name, tmp_path / name)
    return tmp_path / f"{NAMES[0]}.zip"


@pytest.mark.parametrize("kept", [100, 0.5, 0.999])
def test_a_download_cut_short_is_damaged(archive, kept):
    content = archive.read_bytes()
    archive.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(ValueError, match=r"is damaged \(.*\); download it again"):
        package.check(str(archive))


def test_a_changed_byte_is_noticed(archive):
    content = bytearray(archive.read_bytes())
    content[5000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="damaged|SHA-1"):
        package.check(str(archive))


def test_a_whole_zip_with_another_checksum_is_refused(archive):
    rewrite(archive, lambda entry, content: (entry, content + b"\n" if entry.filename.endswith("LICENSE") else content))
    with pytest.raises(ValueError, match=r"SHA-1 is .*, .*model_info.json says .*; download it again"):
        package.check(str(archive))


@pytest.mark.parametrize("name", ["../outside.py", "/etc/outside", "other/file.py", "{}/../../outside", "{}\\..\\x"])
def test_a_zip_that_extracts_elsewhere_is_refused(archive, name):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name.format(NAMES[0]), "outside")
    with pytest.raises(ValueError, match="is no plain file below .*do not extract it"):
        package.check(str(archive))


def test_a_zip_with_a_link_is_refused(archive):
    entry = zipfile.ZipInfo(f"{NAMES[0]}/configs/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(entry, "/etc/passwd")
    with pytest.raises(ValueError, match="configs/link' is no plain file"):
        package.check(str(archive))


def test_an_older_custom_in_a_zip_is_named(archive):
    def older(entry, content):
        return entry, b'__version__ = "0.0.1"\n' if entry.filename.endswith("custom/__init__.py") else content

    rewrite(archive, older)
    with pytest.raises(ValueError, match=r"custom/ has version 0.0.1, its metadata.json needs"):
        package.check(str(archive))


def test_a_zip_that_is_no_bundle_or_not_listed_is_named(archive):
    rewrite(archive, lambda entry, content: None if "metadata" in entry.filename else (entry, content))
    with pytest.raises(ValueError, match="is no bundle"):
        package.check(str(archive))


def test_a_version_that_is_not_listed_is_named(archive):
    archive.with_name("model_info.json").write_text("{}")
    with pytest.raises(ValueError, match="is not listed in"):
        package.check(str(archive))
    archive.with_name("model_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="model_info.json is missing; download it"):
        package.check(str(archive))


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "ci/package.py"), "check", "--archive", str(tmp_path / "absent.zip")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ci/package.py: ")
    assert "absent.zip is missing" in done.stderr
    assert "Traceback" not in done.stderr
