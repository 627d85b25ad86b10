"""The offline checks of packed bundles pass for ours, and each fails for the fault it is there to find."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import network_checks
import package
import pytest
import torch
import verify_bundles
from helpers import ROOT
from unit_tests.bundle_cases import make_data
from unpacked import SCHEMA, Bundle, unpack

NAMES = [path.name for path in package.bundles()]
QUICK = (
    verify_bundles.check_metadata,
    verify_bundles.check_pins,
    verify_bundles.check_card,
    verify_bundles.check_no_personal_paths,
    verify_bundles.check_nothing_evaluates_strings,
    network_checks.check_network,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """All bundles, packed without weights and extracted."""
    folder = tmp_path_factory.mktemp("packed")
    package.build(str(folder / "dist"), without_weights=True)
    return {name: unpack(folder / f"dist/{name}.zip", folder, SCHEMA) for name in NAMES}


@pytest.fixture
def bundle(packed, tmp_path) -> Bundle:
    """A copy to break."""
    shutil.copytree(packed[NAMES[0]].root, tmp_path / NAMES[0])
    return Bundle(tmp_path / NAMES[0], tmp_path, SCHEMA)


def change_metadata(bundle: Bundle, change) -> None:
    metadata = bundle.metadata
    change(metadata)
    (bundle.root / "configs/metadata.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_our_bundles_pass(packed, name, check):
    check(packed[name])


def test_required_fields_are_those_of_the_schema():
    if not SCHEMA.is_file():
        pytest.skip(f"{SCHEMA} is absent; then REQUIRED_METADATA stands for it")
    assert set(verify_bundles.REQUIRED_METADATA) == set(json.loads(SCHEMA.read_text())["required"])


@pytest.mark.parametrize("schema", [SCHEMA, Path("absent.json")])
def test_missing_metadata_are_found_with_and_without_the_schema(bundle, schema):
    change_metadata(bundle, lambda metadata: metadata.pop("task"))
    with pytest.raises(ValueError, match="task"):
        verify_bundles.check_metadata(bundle._replace(schema=schema))


def test_metadata_of_a_wrong_type_are_found(bundle, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"properties": {"version": {"type": "integer"}}}))
    with pytest.raises(ValueError, match=r"metadata.json breaks schema.json: '.*' is not of type 'integer'"):
        verify_bundles.check_metadata(bundle._replace(schema=schema))


def test_a_version_without_a_changelog_is_found(bundle):
    change_metadata(bundle, lambda metadata: metadata.update(version="9.0.0"))
    with pytest.raises(ValueError, match=r"version 9.0.0 is not in its changelog"):
        verify_bundles.check_metadata(bundle)


@pytest.mark.parametrize("key", ["monai_version", "pytorch_version", "numpy_version"])
def test_a_pin_that_is_not_installed_is_found(bundle, key):
    change_metadata(bundle, lambda metadata: metadata.update({key: "0.0.1"}))
    with pytest.raises(ValueError, match=r"pins \w+ 0.0.1, installed [\d.]+; change the pin"):
        verify_bundles.check_pins(bundle)


@pytest.mark.parametrize("said", ["scipy==1.0", ""])
def test_a_card_that_installs_something_else_is_found(bundle, said):
    card = bundle.root / "docs/README.md"
    card.write_text(card.read_text().replace("scipy==1.15.3", said))
    with pytest.raises(ValueError, match=r"docs/README.md does not say to install \['scipy==1.15.3'\]"):
        verify_bundles.check_pins(bundle)


def test_a_package_of_one_command_that_is_not_installed_in_that_version_is_found(packed, tmp_path):
    bundle = Bundle(shutil.copytree(packed["structdiff_seg_cal"].root, tmp_path / "seg"), tmp_path, SCHEMA)
    card = bundle.root / "docs/README.md"
    card.write_text(card.read_text().replace("onnxscript==0.7.2", "onnxscript==0.7.1"))
    with pytest.raises(ValueError, match=r"onnxscript 0.7.1, installed"):
        verify_bundles.check_pins(bundle)


@pytest.mark.parametrize("section", verify_bundles.CARD_SECTIONS)
def test_a_section_missing_from_the_card_is_found(bundle, section):
    card = bundle.root / "docs/README.md"
    card.write_text(card.read_text().replace(f"## {section}\n", "## Other\n"))
    with pytest.raises(ValueError, match=f"lacks the sections .'{section}'"):
        verify_bundles.check_card(bundle)


@pytest.mark.parametrize("path", ["/home/someone/data", "C:\\\\Users\\\\someone", "/tmp/weights"])
def test_a_path_of_one_machine_is_found(bundle, path):
    (bundle.root / "configs/extra.json").write_text(f'{{"dataset_dir": "{path}"}}')
    with pytest.raises(ValueError, match=r"paths of one machine: \['configs/extra.json"):
        verify_bundles.check_no_personal_paths(bundle)


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("configs/extra.json", '{"a": ["$eval(@rule)"]}', "eval evaluates strings"),
        ("configs/extra.json", """{"a": "$__import__('os')"}""", "__import__ evaluates strings"),
        ("custom/extra.py", "def f(text):\n    return exec(text)\n", "exec evaluates strings"),
        ("custom/extra.py", "import torch\ntorch.load('x', weights_only=False)\n", "weights_only must be True"),
    ],
)
def test_what_evaluates_strings_is_found(bundle, file, content, fault):
    (bundle.root / file).write_text(content)
    with pytest.raises(ValueError, match=fault):
        verify_bundles.check_nothing_evaluates_strings(bundle)


def test_a_network_of_another_shape_than_declared_is_found(bundle):
    change_metadata(bundle, lambda m: m["network_data_format"]["outputs"]["pred"].update(num_channels=2))
    with pytest.raises(ValueError, match="output channel number `1` doesn't match: `2`"):
        network_checks.check_network(bundle)


@pytest.mark.slow
def test_a_property_that_is_missing_is_found(bundle):
    make_data(bundle.work)
    config = json.loads((bundle.root / "configs/train.json").read_text())
    config["train"]["cases"] = config["train"].pop("inferer")
    config["train"]["trainer"]["inferer"] = "@train#cases"
    (bundle.root / "configs/train.json").write_text(json.dumps(config))
    assert "Property 'train_inferer' with config ID" in verify_bundles.failure(verify_bundles.check_properties, bundle)


def test_declared_inputs_become_tensors():
    inputs = {
        "image": {"num_channels": 2, "spatial_shape": ["*", 4, 5], "dtype": "float32", "value_range": []},
        "timesteps": {"num_channels": 1, "spatial_shape": [], "dtype": "int64", "value_range": [10, 12]},
    }
    made = network_checks.example_inputs({"network_data_format": {"inputs": inputs}}, size=7, batch=3)
    assert made["image"].shape == (3, 2, 7, 4, 5)
    assert made["timesteps"].shape == (3,)
    assert made["timesteps"].dtype == torch.int64
    assert bool(((made["timesteps"] >= 10) & (made["timesteps"] <= 12)).all())


def test_an_export_that_computes_something_else_is_found():
    eager = torch.ones(3)
    network_checks._agree(eager + 0.5 * network_checks.TOLERANCE, eager, "ONNX")
    for wrong in (eager + 2 * network_checks.TOLERANCE, eager * torch.nan):
        with pytest.raises(ValueError, match="ONNX output differs from the network's by"):
            network_checks._agree(wrong, eager, "ONNX")


def test_a_folder_without_zips_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run python ci/package.py build"):
        verify_bundles.verify(dist=str(tmp_path))


@pytest.mark.slow
def test_all_checks_pass_from_the_command_line(packed):
    dist = next(iter(packed.values())).work / "dist"
    command = [sys.executable, str(ROOT / "ci/verify_bundles.py"), "--dist", str(dist)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    count = len(verify_bundles.CHECKS)
    for name in NAMES:
        assert f"{name}: {count} of {count} checks passed" in done.stdout
