"""A painted set is made without any weights, the same by any number of processes, and the segmenter learns from it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from custom.synthesis.nnunet import export_nnunet
from custom.volumes.anatomy import Anatomy
from helpers import BUNDLE, SEG_BUNDLE, fails_with, template_of, workflow_of

CONFIGS = ("inference.json", "synthesize.json")
ROWS = json.loads((BUNDLE / "configs/inference.json").read_text())["anatomy"]
UNREPORTED = {"synthetic_set#report": "$lambda: None"}
"""Of a set whose report is not looked at."""
SEGMENTER = {
    "spacing_mm": [4.0, 4.0, 4.0],
    "roi_size": [16, 16, 16],
    "roi_margin": 8,
    "network_def#blocks_down": [1, 1],
    "network_def#blocks_up": [1],
    "samples_per_epoch": 4,
    "max_epochs": 1,
    "val_interval": 1,
}


def synthesize(cohort, folder, output_dir, *more, **overrides):
    options = {
        "mode": "painted",
        "mask_datalist": str(folder / "masks.json"),
        "template_datalist": str(cohort / "datalist.json"),
        "ckpt_dir": str(folder / "no_weights"),
        "output_dir": str(output_dir),
        "spacing_mm": [3.0, 3.0, 3.0],
        "report#tracking_uri": None,
        "gate#min_vessel_contrast": None,  # at 3 mm coronaries blur away
        "gate#min_vessel_continuity": None,
        **overrides,
    }
    work = workflow_of(BUNDLE)(*CONFIGS, *more, workflow_type="infer", **options)
    work.run()
    work.finalize()
    return json.loads((output_dir / "datalist.json").read_text())


@pytest.fixture(scope="module")
def masks(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    items = [{"label": str(cohort / f"labels/subject_00{k}.nii.gz")} for k in (2, 3)]
    (folder / "masks.json").write_text(json.dumps({"training": items}))
    return folder


@pytest.fixture(scope="module")
def painted(cohort, masks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted") / "out"
    synthesize(cohort, masks, folder)
    return folder


def values(path):
    return np.asarray(nib.load(path).dataobj)


def test_a_set_is_whole_without_weights_and_says_that_no_network_made_it(cohort, painted):
    listed = json.loads((painted / "datalist.json").read_text())
    assert len(listed["training"]) == 2, listed["rejected"]
    made = listed["provenance"]
    assert (made["mode"], made["network"], made["weights"]) == ("painted", "none, painted", {})
    assert (made["painted_classes"], made["painted_artefacts"]) == (12, [])
    for item, k in zip(listed["training"], (2, 3), strict=True):
        label, given = (values(p) for p in (painted / item["label"], cohort / f"labels/subject_00{k}.nii.gz"))
        np.testing.assert_array_equal(label, given)
        assert (values(painted / item["confidence"]) == 1).all()
        assert item["score_hu"] == 0
        image = values(painted / item["image"])
        measures = json.loads((painted / item["record"]).read_text())["measures"]
        assert measures["label_error_hu"] == measures["label_sd_ratio"] == {}, (
            "the template's colours are not asked for"
        )
        for index, (low, high) in Anatomy(ROWS).plausible_hu.items():
            assert low - 5 <= image[given == index].mean() <= high + 5
    assert (painted / "report.html").is_file()
    assert len([*painted.glob("pictures/*.png")]) == 2


def test_two_processes_make_the_same_files_as_one(cohort, masks, painted, tmp_path):
    for shard in (1, 0):
        synthesize(cohort, masks, tmp_path / "out", shard=shard, shards=2, **UNREPORTED)
    for path in sorted(painted.glob("images/*.nii.gz")):
        assert (tmp_path / "out/images" / path.name).read_bytes() == path.read_bytes()


def test_another_seed_paints_another_contrast(cohort, masks, painted, tmp_path):
    (tmp_path / "masks.json").write_text(
        json.dumps({"training": [{"label": str(cohort / "labels/subject_002.nii.gz")}]})
    )
    synthesize(cohort, tmp_path, tmp_path / "out", seed=1, **UNREPORTED)
    first, other = (next(folder.glob("images/subject_002*")) for folder in (painted, tmp_path / "out"))
    chamber = values(cohort / "labels/subject_002.nii.gz") == 3
    assert abs(float(values(first)[chamber].mean()) - float(values(other)[chamber].mean())) > 15


def test_the_segmenter_is_pre_trained_on_it(cohort, painted, tmp_path):
    work = workflow_of(SEG_BUNDLE)(
        "train.json",
        "pretrain.json",
        dataset_dir=str(cohort),
        synthetic_datalists=[str(painted / "datalist.json")],
        output_dir=str(tmp_path / "out"),
        ckpt_dir=str(tmp_path / "models"),
        **SEGMENTER,
    )
    work.run()
    work.finalize()
    assert (tmp_path / "models/pretrained.pt").is_file()


def test_it_is_exported_to_nnunet(painted, tmp_path):
    folder = tmp_path / "Dataset501_Painted"
    mapping = {"from": [], "to": []}
    assert export_nnunet(str(painted / "datalist.json"), str(folder), labels=Anatomy(ROWS), label_mapping=mapping) == 2
    assert len([*folder.glob("imagesTr/*.nii.gz")]) == len([*folder.glob("labelsTr/*.nii.gz")]) == 2


def test_a_set_of_the_network_is_not_continued_by_painting(cohort, masks, painted):
    with fails_with("synthesis.json belongs to another run"):
        synthesize(cohort, masks, painted, painted_classes=9)


def test_calibrating_is_refused_with_what_to_do(cohort, masks, tmp_path):
    table = {"confidence_table": str(tmp_path / "table.json")}
    with fails_with("got a mode without one, whose confidence is 1 everywhere; leave `calibrating` out"):
        synthesize(cohort, masks, tmp_path / "out", "calibrate.json", mask_section="training", **table)
    assert not (tmp_path / "table.json").exists()


def test_single_masks_are_painted_by_inference_alone(cohort, tmp_path):
    work = workflow_of(BUNDLE)(
        "inference.json",
        workflow_type="infer",
        mode="painted",
        target_masks=[str(cohort / "labels/subject_003.nii.gz")],
        templates=[template_of(cohort)],
        output_dir=str(tmp_path / "out"),
        ckpt_dir=str(tmp_path / "no_weights"),
        spacing_mm=[3.0, 3.0, 3.0],
        save_structure=True,
        painted_artefacts=["plaques", "streaks", "motion"],
    )
    work.run()
    work.finalize()
    name = "subject_003_from_subject_000.nii.gz"
    image, structure = (values(tmp_path / "out" / place).astype(float) for place in (name, f"structure/{name}"))
    chamber = values(cohort / "labels/subject_003.nii.gz") == 3
    assert 3 < (image - structure)[chamber].std() < 60, "its grain"
