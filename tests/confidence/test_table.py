"""The confidence table as a file: what it must hold, and which masks it is from."""

import json
from types import SimpleNamespace

import pytest
import torch
from custom.confidence.table import _VOXELS_OF_A_LABEL, CalibrateConfidence
from custom.confidence.transforms import EstimateConfidenced, TrustPaintedd
from custom.runs.files import content_hash
from custom.synthesis.cases import synthesis_cases
from monai.data import MetaTensor

WHOLE = {"tau_hu2": [5.0, 7.5], "weights": "abc"}


def estimate(path):
    return EstimateConfidenced(str(path), made_with={"weights": "abc"})


def test_a_whole_table_is_read(tmp_path):
    (tmp_path / "confidence.json").write_text(json.dumps(WHOLE))
    assert estimate(tmp_path / "confidence.json").tau.tolist() == [5.0, 7.5]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(WHOLE)[:20], "is damaged"),
        ("", "is damaged"),
        ("[1, 2]", "is damaged .it must hold one JSON object"),
        (json.dumps({"weights": "abc"}), "is damaged .tau_hu2 must hold a number above 0 for each label, got None"),
        *(
            (json.dumps(WHOLE | {"tau_hu2": tau}), "is damaged .tau_hu2 must hold a number above 0 for each label, got")
            for tau in ([], 5.0, "5", {}, [5, 0.0], [5, -1.0], [5, float("nan")], [5, float("inf")], [5, None])
        ),
    ],
)
def test_a_damaged_table_is_named_with_the_remedy(tmp_path, content, reason):
    path = tmp_path / "confidence.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path}: {reason}.*; calibrate anew \(calibrate.json\), or point"):
        estimate(path)


def test_a_table_of_an_older_version_and_one_of_other_weights_are_told_so(tmp_path):
    path = tmp_path / "confidence.json"
    path.write_text(json.dumps(WHOLE | {"tau_hu2": [[5.0], [7.5]]}))
    with pytest.raises(ValueError, match="was made by an older version"):
        estimate(path)
    path.write_text(json.dumps(WHOLE | {"weights": "xyz"}))
    with pytest.raises(ValueError, match="made with weights xyz, not abc; calibrate anew, or bring back the model.pt"):
        estimate(path)
    with pytest.raises(FileNotFoundError, match="no confidence table; run calibrate.json"):
        estimate(tmp_path / "none.json")


def collected(tmp_path, masks):
    """Table of one volume for each mask: label 0 alone, 60^3 voxels with their numbers as variance; and the voxels."""
    for file in masks:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    template = dict.fromkeys(("image", "label"), str(tmp_path / masks[0]))
    settings = {"images_per_mask": 1, "seed": 0, "num_labels": 1, "label_mapping": {"from": [], "to": []}}
    given = [{"label": str(tmp_path / file)} for file in masks]
    cases = synthesis_cases(given, [template], choice="random", **settings)
    made = CalibrateConfidence(str(tmp_path / "confidence.json"), made_with={"weights": "abc"}, num_labels=1)
    variance = torch.arange(60.0**3).reshape(1, 1, 60, 60, 60)
    output = {"pred": torch.cat([variance, variance], 1)}
    for case in cases:
        batch = {"label": torch.zeros_like(variance), **{key: [value] for key, value in case.items() if key != "label"}}
        made.collect(SimpleNamespace(state=SimpleNamespace(output=output, batch=batch)))
    made.write(None)
    return json.loads((tmp_path / "confidence.json").read_text()), [kept for kept, _ in made._cases]


def test_masks_of_one_file_name_are_told_apart_in_table_and_draws(tmp_path):
    content, (first, second) = collected(tmp_path, ["a/seg.nii.gz", "b/seg.nii.gz"])
    assert content["masks"] == ["a_seg", "b_seg"]
    assert content["voxels"] == [2 * _VOXELS_OF_A_LABEL]
    assert not torch.equal(first, second)


def test_the_draws_of_a_mask_are_those_of_its_file_name_where_no_other_has_it(tmp_path):
    """By which the shipped table was made."""
    content, (kept, _) = collected(tmp_path, ["a/subject_042.nii.gz", "b/subject_043.nii.gz"])
    assert content["masks"] == ["subject_042", "subject_043"]
    seed = int(content_hash(b"subject_042.nii.gz")[:8], 16)
    drawn = torch.randperm(60**3, generator=torch.Generator().manual_seed(seed))[:_VOXELS_OF_A_LABEL]
    torch.testing.assert_close(kept, drawn.float(), rtol=0, atol=0)


def test_a_mode_without_a_network_has_nothing_to_calibrate(tmp_path):
    with pytest.raises(ValueError, match="mode: confidence is calibrated for a network, .* leave `calibrating` out"):
        CalibrateConfidence(str(tmp_path / "confidence.json"), made_with={"weights": None}, num_labels=1)


def test_what_is_painted_is_trusted_everywhere():
    image = MetaTensor(torch.zeros(1, 3, 4, 5), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    item = TrustPaintedd()({"pred": image})
    assert (item["confidence"] == 1).all()
    assert item["confidence"].shape == image.shape
    assert torch.equal(item["confidence"].affine, image.affine)
    assert item["score"] == 0
