"""Checks packed bundles as the MONAI Model Zoo does, without a network connection, and a few things more.

    python ci/package.py build --output_dir dist
    python ci/verify_bundles.py --dist dist

Every check is a function that takes an unpacked bundle and raises ValueError.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fire
import jsonschema
from monai.bundle import ConfigWorkflow
from network_checks import check_network, check_onnx, check_torchscript
from unit_tests.bundle_cases import entries, make_data
from unpacked import SCHEMA, Bundle, unpack

REQUIRED_METADATA = (
    "schema",
    "version",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
)
"""What the schema of 2024-07-25 requires; used where the file itself is absent."""
CARD_SECTIONS = ("Data", "Performance", "Commands", "Limitations", "References", "License")
_PERSONAL = re.compile(r"/home/\w|/Users/\w|/root/|/mnt/|[A-Za-z]:\\\\?Users|/tmp/")
_EVALUATES = {"eval", "exec", "compile", "__import__"}


def _text_files(bundle: Bundle) -> Iterator[tuple[Path, str]]:
    for path in sorted(bundle.root.rglob("*")):
        if path.suffix in {".json", ".py", ".md", ".txt", ".conf"}:
            yield path.relative_to(bundle.root), path.read_text()


def check_metadata(bundle: Bundle) -> None:
    """Metadata follow the schema, and the changelog speaks of this version."""
    if bundle.schema.is_file():
        try:
            jsonschema.validate(bundle.metadata, json.loads(bundle.schema.read_text()))
        except jsonschema.ValidationError as error:
            raise ValueError(f"metadata.json breaks {bundle.schema.name}: {error.message}") from error
    missing = [key for key in REQUIRED_METADATA if key not in bundle.metadata]
    if missing:
        raise ValueError(f"metadata.json lacks {missing}, which the schema requires")
    if bundle.metadata["version"] not in bundle.metadata.get("changelog", {}):
        raise ValueError(f"metadata.json: version {bundle.metadata['version']} is not in its changelog")


def check_pins(bundle: Bundle) -> None:
    """Versions in metadata and card agree and are those installed here, with which the checks below ran."""
    metadata = bundle.metadata
    pins = dict(metadata["required_packages_version"])
    pins |= {name: metadata[f"{key}_version"] for name, key in (("monai", "monai"), ("numpy", "numpy"))}
    pins["torch"] = metadata["pytorch_version"]
    card = dict(re.findall(r"([\w-]+)==([\d.]+)", (bundle.root / "docs/README.md").read_text()))
    asked = card | pins  # the card also has what single commands need
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in asked}
    differing = [
        f"{name} {asked[name]}, installed {installed[name]}" for name in asked if asked[name] != installed[name]
    ]
    if differing:
        raise ValueError(f"the bundle pins {'; '.join(differing)}; change the pin or install ci/constraints.txt")
    absent = [f"{name}=={version}" for name, version in pins.items() if card.get(name) != version]
    if absent:
        raise ValueError(f"docs/README.md does not say to install {absent}, which metadata.json pins; say so")


def check_card(bundle: Bundle) -> None:
    """The model card has the sections of the zoo's template, each with content."""
    text = (bundle.root / "docs/README.md").read_text()
    sections = {
        title.strip(): body.strip() for title, body in re.findall(r"^#+ +(.+?)$\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    }
    missing = [title for title in CARD_SECTIONS if not sections.get(title)]
    if missing:
        raise ValueError(f"docs/README.md lacks the sections {missing}, or they are empty")


def check_no_personal_paths(bundle: Bundle) -> None:
    """No file names a folder of the machine it was made on."""
    found = [f"{path}: {match[0]}" for path, text in _text_files(bundle) if (match := _PERSONAL.search(text))]
    if found:
        raise ValueError(f"paths of one machine: {found}; use bundle_root and options")


def check_nothing_evaluates_strings(bundle: Bundle) -> None:
    """No expression of a config and no part evaluates strings, and weights are read as tensors only."""
    for path, text in _text_files(bundle):
        sources = [text] if path.suffix == ".py" else []
        if path.suffix == ".json":
            sources = [value[1:] for value in _strings(json.loads(text)) if value.startswith("$")]
            sources = [re.sub(r"@[\w#]+", "reference", source) for source in sources]
        for source in sources:
            for node in ast.walk(ast.parse(source)):
                name = getattr(node, "id", "") or getattr(node, "attr", "")
                if isinstance(node, ast.Name) and name in _EVALUATES:
                    raise ValueError(f"{path}: {name} evaluates strings; no file of a user may reach it")
                if isinstance(node, ast.keyword) and node.arg == "weights_only" and not _is_true(node.value):
                    raise ValueError(f"{path}: weights_only must be True")


def _is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _strings(value: Any) -> Iterator[str]:
    """All strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def check_properties(bundle: Bundle) -> None:
    """Train, inference and evaluate have the ids by which MONAI's applications reach into a workflow."""
    cases = entries(bundle.root.name, bundle.work)
    for name in ("train", "inference", "evaluate"):
        entry = cases[name]
        workflow = ConfigWorkflow(
            config_file=[bundle.config(file) for file in entry.configs],
            workflow_type=entry.workflow_type,
            logging_file=False,
            bundle_root=str(bundle.root),
            **entry.options,
        )
        workflow.initialize()
        missing = workflow.check_properties()
        if missing:
            raise ValueError(f"{name}.json lacks the properties {missing}")


CHECKS: tuple[Callable[[Bundle], None], ...] = (
    check_metadata,
    check_pins,
    check_card,
    check_no_personal_paths,
    check_nothing_evaluates_strings,
    check_properties,
    check_network,
    check_torchscript,
    check_onnx,
)


def verify(*, dist: str = "dist", schema: str = str(SCHEMA)) -> list[str]:
    """Run all checks on all bundles of a folder.

    Args:
        dist: folder that `ci/package.py build` filled.
        schema: file of the metadata schema; where it is absent, only the required fields are looked for.

    Returns:
        One line for each bundle.

    Raises:
        ValueError: naming every check that failed, and why.
    """
    archives = [path for path in sorted(Path(dist).glob("*.zip")) if not re.search(r"_v\d[^_]*$", path.stem)]
    if not archives:
        raise FileNotFoundError(f"dist: no zip files in {dist}; run python ci/package.py build --output_dir {dist}")
    lines: list[str] = []
    failures: list[str] = []
    for archive in archives:
        with tempfile.TemporaryDirectory() as work:
            bundle = unpack(archive, Path(work), Path(schema))
            sys.path.insert(0, str(bundle.root))  # its own `custom`, as in the zoo
            make_data(bundle.work)
            broken = [f"{archive.stem}: {c.__name__}: {error}" for c in CHECKS if (error := failure(c, bundle))]
            shipped = "shipped" if bundle.has_weights() else "fresh, none are shipped"
            lines.append(
                f"{archive.stem}: {len(CHECKS) - len(broken)} of {len(CHECKS)} checks passed; weights: {shipped}"
            )
        failures += broken
    if failures:
        raise ValueError("\n".join(failures))
    return lines


def failure(check: Callable[[Bundle], None], bundle: Bundle) -> str:
    """What a check finds wrong, or an empty string; MONAI and torch raise errors of many types."""
    try:
        check(bundle)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # MONAI logs every argument, tensors included
    try:
        fire.Fire(verify)
    except (ValueError, OSError) as error:
        sys.exit(f"ci/verify_bundles.py: {error}")
