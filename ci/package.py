"""Packs the bundles into the zip files that `python -m monai.bundle download` reads, and checks such files.

    python ci/package.py build --output_dir dist
    python ci/package.py check --archive dist/structdiff_cardiac.zip

Each bundle becomes `NAME.zip` and the same bytes as `NAME_vVERSION.zip`, with one top folder NAME and the package
`custom` copied in. `model_info.json` lists sizes and checksums in the form of the model zoo. The same input gives the
same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fire
import torch
from custom.runs.files import replace_file, write_json

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "models/model.pt"
NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md")
FOLDERS = ("configs", "docs", "models")
SOURCES = (".py", ".html", ".css", ".js")
MAX_FILE_BYTES = 25 * 2**20
MAX_ZIP_BYTES = 30 * 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)


def bundles(root: Path = ROOT) -> list[Path]:
    """Folders of all bundles of a checkout, by name."""
    return sorted(path.parents[1] for path in (root / "bundles").glob("*/configs/metadata.json"))


def version_of(source: str) -> str:
    """The `__version__` that a module assigns, without running it; "unknown" where there is none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__version__" for t in node.targets):
            return str(ast.literal_eval(node.value))
    return "unknown"


def _files_below(folder: Path) -> Iterator[Path]:
    """Files of a folder, but for hidden ones and byte code. A symbolic link, which may lead outside, raises."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link and may lead outside the bundle; put a plain folder there")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _files_below(path)
        elif path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is a symbolic link or no plain file; put a plain file there")
        else:
            yield path


def bundle_files(bundle: Path, custom: Path, *, weights: bool) -> dict[str, Path]:
    """What a bundle's zip holds: name in the zip -> file.

    Args:
        bundle: folder of the bundle.
        custom: folder of the package that its configs name.
        weights: False leaves `models/` out.

    Raises:
        FileNotFoundError: naming a needed file that is missing, and what to do.
        ValueError: on links, files over the limit of the model zoo, and weights that are no plain state dictionary.
    """
    for name in NEEDED:
        if not (bundle / name).is_file():
            raise FileNotFoundError(f"{bundle / name} is missing; every bundle of the model zoo has one")
    if weights and not (bundle / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{bundle / WEIGHTS} is missing: train the bundle and copy the weights there, "
            "or pass --without_weights to pack configs, code and documents only"
        )
    taken = {"LICENSE", *FOLDERS} - (set() if weights else {"models"})
    found = [path for path in _files_below(bundle) if path.relative_to(bundle).parts[0] in taken]
    members = {f"{bundle.name}/{path.relative_to(bundle).as_posix()}": path for path in found}
    sources = [path for path in _files_below(custom) if path.suffix in SOURCES]
    members |= {f"{bundle.name}/custom/{path.relative_to(custom).as_posix()}": path for path in sources}
    for path in members.values():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; the model zoo takes at most {MAX_FILE_BYTES}")
    if weights:
        check_weights(bundle / WEIGHTS)
    return dict(sorted(members.items()))


def check_weights(path: Path) -> None:
    """Refuses weights that `torch.load(weights_only=True)` does not read as a flat dictionary of tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read with weights_only=True: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dictionary; save network.state_dict() there, not a training checkpoint")


def _write_zip(path: Path, members: dict[str, Path]) -> None:
    """One entry a file with fixed date, rights and order: bytes depend on names and contents only."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in members.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, source.read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)


def _digest(path: Path, kind: str) -> str:
    return hashlib.new(kind, path.read_bytes()).hexdigest()


def build(output_dir: str, *, without_weights: bool = False, base_url: str = "", root: str = str(ROOT)) -> list[str]:
    """Pack every bundle of a checkout.

    Args:
        output_dir: folder for the zip files and `model_info.json`; files of these names are replaced.
        without_weights: leave `models/` out, for a bundle that is not trained yet.
        base_url: where the files will be served; stands before their names in `model_info.json`.
        root: the checkout.

    Returns:
        One line for each bundle.

    Raises:
        FileNotFoundError: naming what is missing, and what to do.
        ValueError: naming the file and the rule it breaks.
    """
    folder, custom = Path(output_dir), Path(root) / "custom"
    version, info = version_of((custom / "__init__.py").read_text()), {}
    if not bundles(Path(root)):
        raise FileNotFoundError(f"root: no bundles/*/configs/metadata.json in {root}; name a checkout of this project")
    for bundle in bundles(Path(root)):
        metadata = json.loads((bundle / "configs/metadata.json").read_text())
        if metadata.get("custom_version") != version:
            raise ValueError(
                f"{bundle}/configs/metadata.json: custom_version is {metadata.get('custom_version')}, but "
                f"custom/__init__.py has {version}; raise both together"
            )
        members = bundle_files(bundle, custom, weights=not without_weights)
        plain, versioned = (folder / f"{bundle.name}{end}.zip" for end in ("", f"_v{metadata['version']}"))
        for path in (plain, versioned):
            replace_file(path, lambda part, members=members: _write_zip(part, members))
        info[versioned.stem] = {
            "checksum": _digest(versioned, "sha1"),
            "source": f"{base_url.rstrip('/')}/{versioned.name}".lstrip("/"),
            "sha256": _digest(versioned, "sha256"),
            "size": versioned.stat().st_size,
        }
    write_json(folder / "model_info.json", info)
    lines = [check(str(folder / f"{bundle.name}.zip")) for bundle in bundles(Path(root))]
    _check_same_custom([folder / f"{bundle.name}.zip" for bundle in bundles(Path(root))])
    return lines


def _check_same_custom(archives: list[Path]) -> None:
    """MONAI Label keeps the first `custom` it imports in memory, so all bundles must carry the same bytes."""
    contents = []
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if PurePosixPath(name).parts[1] == "custom"]
            contents.append({name.split("/", 1)[1]: archive.read(name) for name in names})
    if any(content != contents[0] for content in contents):
        raise ValueError(f"custom/ changed while {[path.name for path in archives]} were written; build again")


def check(archive: str, *, model_info: str | None = None) -> str:
    """Check a zip file of a bundle: whole, listed with its checksum, and holding nothing that extracts elsewhere.

    Args:
        archive: `NAME.zip` or `NAME_vVERSION.zip`.
        model_info: list of checksums; `model_info.json` beside the file when absent.

    Returns:
        A line that says what the file is.

    Raises:
        FileNotFoundError: if file or list are missing.
        ValueError: naming the file and what is wrong with it.
    """
    path = Path(archive)
    info_path = Path(model_info) if model_info else path.with_name("model_info.json")
    for file in (path, info_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; download it beside the other, or name it")
    name = re.sub(r"_v\d[^_]*$", "", path.stem)
    metadata = _checked_metadata(path, name)
    title, digest = f"{name}_v{metadata['version']}", _digest(path, "sha1")
    listed = json.loads(info_path.read_text()).get(title)
    if listed is None:
        raise ValueError(f"{path}: {title} is not listed in {info_path}; get the list that belongs to it")
    if digest != listed["checksum"]:
        raise ValueError(f"{path}: SHA-1 is {digest}, {info_path} says {listed['checksum']}; download it again")
    if path.stat().st_size > MAX_ZIP_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MAX_ZIP_BYTES} are allowed")
    return f"{path.name}: {name} {metadata['version']}, {path.stat().st_size} bytes, sha1 {digest}"


def _checked_metadata(path: Path, name: str) -> dict[str, Any]:
    """Metadata from a zip whose entries are whole and all lie below the folder `name`."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"checksum of {damaged}")
            for entry in archive.infolist():
                parts = PurePosixPath(entry.filename).parts
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if parts[:1] != (name,) or ".." in parts or "\\" in entry.filename or kind not in (0, stat.S_IFREG):
                    raise ValueError(
                        f"{path}: entry {entry.filename!r} is no plain file below {name}/; do not extract it"
                    )
            metadata = json.loads(archive.read(f"{name}/configs/metadata.json"))
            version = version_of(archive.read(f"{name}/custom/__init__.py").decode())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    except KeyError as error:
        raise ValueError(f"{path} is no bundle {name}: {error}") from error
    if metadata.get("custom_version") != version:
        raise ValueError(
            f"{path}: its custom/ has version {version}, its metadata.json needs {metadata.get('custom_version')}; "
            "build it again"
        )
    return metadata


if __name__ == "__main__":
    try:
        fire.Fire({"build": build, "check": check})
    except (ValueError, OSError) as error:
        sys.exit(f"ci/package.py: {error}")
