"""Another label map is one file: lung, bronchi and trachea go through masks, generator, rendering and segmenter."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import BUNDLE, ORGAN, ORGAN_ROWS, SEG_BUNDLE, TINY, TINY_TRAINING, airway, assert_kept, workflow_of
from scipy import ndimage

SPACING = [4.0, 4.0, 4.0]
SMALL = {**TINY, **TINY_TRAINING, "spacing_mm": SPACING, "max_epochs": 1, "amp": False}
SMALL["learning_rate"] = 1e-4  # two steps of the usual one move the mean by 170 HU


@pytest.fixture(scope="module")
def organ(tmp_path_factory):
    """`organ.json`, the one file, and two cases of the organ at 3 mm, listed for training, validation and test."""
    folder = tmp_path_factory.mktemp("organ")
    (folder / "organ.json").write_text(json.dumps({"anatomy": ORGAN_ROWS}))
    label, affine = airway(), np.diag([3.0, 3.0, 3.0, 1.0])
    nominal = np.array([ORGAN_ROWS[str(k)]["nominal_hu"] for k in range(4)], np.float32)
    for number in (0, 1):
        shown = np.roll(label, number, 0)
        noise = np.random.default_rng(number).normal(0, 20, label.shape)
        image = ndimage.gaussian_filter(nominal[shown], 0.5) + noise
        nib.save(nib.Nifti1Image(shown, affine), folder / f"label_{number}.nii.gz")
        nib.save(nib.Nifti1Image(image.astype(np.int16), affine), folder / f"image_{number}.nii.gz")
    first, second = ({"image": f"image_{n}.nii.gz", "label": f"label_{n}.nii.gz"} for n in (0, 1))
    lists = {"training": [first, second], "validation": [second], "test": [second]}
    (folder / "datalist.json").write_text(json.dumps(lists))
    return folder


def run(bundle, organ, *names, kind="train", **options):
    """Run configs with the one file as the last."""
    work = workflow_of(bundle)(*names, organ / "organ.json", workflow_type=kind, **options)
    work.run()
    work.finalize()
    return work


def test_one_file_takes_an_organ_through_masks_generator_and_rendering(organ, tmp_path):
    motion = {"motion#coarse_mm": 6.0, "motion#fine_mm": 1.0, "motion#margin_mm": 20.0}
    made = {"reference_datalist": str(organ / "datalist.json"), "count": 2, "output_dir": str(tmp_path / "masks")}
    run(BUNDLE, organ, "generate_masks.json", kind=None, run_id="generating", **made, **motion)
    masks = [tmp_path / f"masks/masks/mask_000{n}.nii.gz" for n in (0, 1)]
    for number, mask in enumerate(masks):
        source = np.asarray(nib.load(tmp_path / f"masks/prepared/label_{number}.nii.gz").dataobj)
        new = np.asarray(nib.load(mask).dataobj)
        assert (new != source).any()
        assert_kept(new, source, ORGAN)
    models = {"ckpt_dir": str(tmp_path / "models")}
    trained = run(
        BUNDLE, organ, "train.json", dataset_dir=str(organ), output_dir=str(tmp_path / "out"), **SMALL, **models
    )
    assert trained.parser.get_parsed_content("network_def").num_labels == 4
    template = {key: str(organ / f"{key}_0.nii.gz") for key in ("image", "label")}
    rendering = {**TINY, **models, "spacing_mm": SPACING, "sampling_steps": 2, "output_dir": str(tmp_path / "rendered")}
    targets = {"target_masks": [str(masks[1])], "templates": [template]}
    run(BUNDLE, organ, "inference.json", kind="infer", **rendering, **targets)
    image = np.asarray(nib.load(tmp_path / "rendered/mask_0001_from_image_0.nii.gz").dataobj)
    label = np.asarray(nib.load(masks[1]).dataobj)
    assert image.shape == label.shape
    scan, scanned = (np.asarray(nib.load(template[key]).dataobj) for key in ("image", "label"))
    assert abs(image[label == 1].mean() - scan[scanned == 1].mean()) < 60
    assert abs(image[label == 0].mean() - scan[scanned == 0].mean()) < 60


def test_the_same_file_trains_and_evaluates_a_segmenter(organ, tmp_path):
    small = {"network_def#init_filters": 8, "spacing_mm": SPACING, "roi_size": [32, 32, 32], "roi_margin": 4}
    small |= {"samples_per_epoch": 4, "max_epochs": 1, "val_interval": 1, "dataset_dir": str(organ)}
    small["ckpt_dir"] = str(tmp_path / "models")
    run(SEG_BUNDLE, organ, "train.json", output_dir=str(tmp_path / "out"), **small)
    state = torch.load(tmp_path / "models/model.pt", weights_only=True)
    assert state["conv_final.2.conv.bias"].shape == (4,)
    run(SEG_BUNDLE, organ, "train.json", "evaluate.json", output_dir=str(tmp_path / "eval"), **small)
    table = (tmp_path / "eval/labels.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in table] == ["label", "lung", "bronchi", "trachea"]
