"""Label ids are renumbered once, all rules at once, and what is mapped is left."""

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.volumes.numbering import MapLabelsd, check_mapping
from custom.volumes.reading import read_labels

SWAP = {"from": [1, 3, 2, 5], "to": [3, 1, 5, 2]}
CHAIN = {"from": [1, 2, 3], "to": [2, 3, 4]}
IDS = torch.tensor([[[[0, 1, 2, 3, 5, 6]]]]).float()


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [(SWAP, [0, 3, 5, 1, 2, 6]), (CHAIN, [0, 2, 3, 4, 5, 6]), ({"from": [], "to": []}, [0, 1, 2, 3, 5, 6])],
    ids=["swap", "chain", "none"],
)
def test_rules_hold_for_the_ids_of_the_file(mapping, expected):
    assert MapLabelsd("label", mapping)({"label": IDS})["label"].flatten().tolist() == expected


@pytest.mark.parametrize(("stated", "first"), [(True, 1), (False, 3)])
def test_what_is_mapped_is_left_and_the_entry_goes(stated, first):
    item = MapLabelsd(["label", "template_label"], SWAP)(
        {"label": IDS, "mapped_label": stated, "template_label": IDS, "case": "a"}
    )
    assert item["label"].flatten()[1] == first
    assert item["template_label"].flatten()[1] == 3
    assert item.keys() == {"label", "template_label", "case"}, "batches need the same entries in every item"


def test_the_entry_goes_where_there_is_nothing_to_renumber():
    item = MapLabelsd("label", {"from": [], "to": []})({"label": IDS, "mapped_label": True})
    assert item.keys() == {"label"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ([1, 2], [3], "'from' must name as many ids as 'to'"),
        ([1, 1], [2, 3], r"none twice, got \[1, 1\] and \[2, 3\]"),
        ([11], [12], r"new ids must be in the label map 0 to 10, got \[12\]; 0 drops a label"),
        ([11], [-1], r"got \[-1\]"),
    ],
)
def test_mappings_that_cannot_be_meant_are_refused(old, new, message):
    check_mapping(SWAP, 11)
    with pytest.raises(ValueError, match=f"label_mapping: .*{message}"):
        check_mapping({"from": old, "to": new}, 11)


def test_a_label_is_read_in_the_ids_of_the_model_and_3d(tmp_path):
    (tmp_path / "run/masks").mkdir(parents=True)
    image = nib.Nifti1Image(IDS[0].numpy().astype(np.uint8)[..., None], np.eye(4))
    for place in (tmp_path / "own.nii.gz", tmp_path / "run/masks/m.nii.gz"):
        nib.save(image, place)
    (tmp_path / "run/generation.json").touch()
    own = read_labels({"label": str(tmp_path / "own.nii.gz")}, SWAP)
    assert own.shape == (1, 1, 1, 6)
    assert own.flatten().tolist() == [0, 3, 5, 1, 2, 6]
    made = read_labels({"label": str(tmp_path / "run/masks/m.nii.gz")}, SWAP)
    assert made.flatten().tolist() == IDS.flatten().tolist()
