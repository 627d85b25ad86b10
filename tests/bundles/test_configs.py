"""What configs of both bundles share is the same, and they read like a description."""

import json
import re

import package
import pytest
import torch
from helpers import BUNDLE, SEG_BUNDLE
from monai.bundle import ConfigParser

COMPLETE = [BUNDLE / "configs" / name for name in ("train.json", "inference.json", "generate_masks.json")]
COMPLETE += [SEG_BUNDLE / "configs" / name for name in ("train.json", "inference.json")]
CONFIGS = [path for bundle in package.bundles() for path in sorted((bundle / "configs").glob("*.json"))]


def name_of(path):
    return f"{path.parents[1].name}/{path.name}"


@pytest.mark.parametrize("block", ["anatomy", "label_mapping"])
def test_the_label_map_is_one_table_in_every_complete_config(block):
    values = [json.loads(path.read_text())[block] for path in COMPLETE]
    assert all(value == values[0] for value in values)


COLUMNS = {
    "names": {"name"},
    "foreground": set(),
    "num_labels": set(),
    "class_weights": {"class_weight"},
    "aligning": {"thin", "aligns"},
    "origins": {"thin", "touches"},
    "structures": {"name", "thin", "components", "handles", "touches", "wall", "keep"},
}
"""Property of `Anatomy` -> columns it is made of, where that is not the column of its name. Of the structures the masks
use these."""


@pytest.mark.parametrize(
    "chain",
    [
        [BUNDLE, "train.json"],
        [BUNDLE, "generate_masks.json"],
        [BUNDLE, "inference.json"],
        [BUNDLE, "inference.json", "synthesize.json"],
        [SEG_BUNDLE, "train.json"],
        [SEG_BUNDLE, "train.json", "pretrain.json"],
    ],
    ids=lambda chain: "-".join(chain[1:]),
)
def test_what_a_run_records_of_the_anatomy_is_what_its_configs_ask_it_for(chain):
    bundle, *names = chain
    config = ConfigParser.load_config_files([bundle / "configs" / name for name in names])
    text = json.dumps({key: value for key, value in config.items() if key != "report"})
    (recorded,) = re.findall(r"@labels\.columns\(([^)]*)\)", text)
    asked = set(re.findall(r"@labels\.(?!columns)(\w+)", text))
    needed = set().union(*(COLUMNS.get(name, {name}) for name in asked))
    assert needed <= set(re.findall(r"\w+", recorded)) <= needed | {"name"}


def test_files_that_stand_in_both_bundles_are_the_same():
    first, second = ((bundle / "configs/logging.conf").read_bytes() for bundle in (BUNDLE, SEG_BUNDLE))
    assert first == second
    first, second = (
        json.loads((bundle / "configs/multi_gpu_train.json").read_text()) for bundle in (BUNDLE, SEG_BUNDLE)
    )
    unused = first["network"].pop("find_unused_parameters")
    assert unused == "$@moments_epochs > 0", "while moments are trained alone, the U-Net of the generator is idle"
    assert first == second


def test_metadata_agree_on_versions_of_packages():
    first, second = (json.loads((bundle / "configs/metadata.json").read_text()) for bundle in (BUNDLE, SEG_BUNDLE))
    same = ("custom_version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version")
    assert all(first[key] == second[key] for key in same)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name != "metadata.json"], ids=name_of)
def test_no_line_of_a_config_is_longer_than_120_characters(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("path", COMPLETE, ids=name_of)
def test_precision_is_an_option_at_the_top_and_off(path):
    config = json.loads(path.read_text())
    if path.name == "generate_masks.json":
        assert "amp" not in config, "no network runs here"
    else:
        assert config["amp"] is False
        assert list(config).index("amp") < list(config).index("anatomy")


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_no_list_of_labels_stands_beside_the_table(path):
    """Every list of label ids or of values by label is a column of `anatomy`."""
    gone = {"label_names", "nominal_hu", "thin_labels", "alignment_labels", "structures", "class_weights"}
    gone |= {"hu_ranges", "vessel_origins", "plausible_hu"}
    assert not gone & set(json.loads(path.read_text()))


@pytest.mark.parametrize("bundle", [BUNDLE, SEG_BUNDLE], ids=lambda bundle: bundle.name)
def test_shipped_weights_load_on_any_machine(bundle):
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    assert {value.device.type for value in state.values()} == {"cpu"}
