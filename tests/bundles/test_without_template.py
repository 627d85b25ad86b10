"""The coarse stage trains on files, and what it draws is rendered in the modes without a template."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.volumes.anatomy import Anatomy
from helpers import BUNDLE, TINY, TINY_COARSE, fails_with, template_of, workflow_of
from ignite.engine import Events
from scipy import ndimage

COARSE_TRAINING = {
    "network_def#channels": TINY_COARSE["coarse_def#channels"],
    "spacing_mm": [3.0, 3.0, 3.0],
    "roi_size": [16, 16, 16],
    "samples_per_epoch": 4,
    "pair_uses": 1,
    "batch_size": 2,
    "max_epochs": 2,
    "val_interval": 1,
    "val_cases": 1,
}
NAME = "subject_003"


def inference(cohort, output_dir, ckpt_dir, *, mask=None, **options):
    return workflow_of(BUNDLE)(
        "inference.json",
        workflow_type="infer",
        target_masks=[str(mask or cohort / f"labels/{NAME}.nii.gz")],
        templates=[template_of(cohort)] if options.get("mode") == "template" else [],
        output_dir=str(output_dir),
        ckpt_dir=str(ckpt_dir),
        **{**TINY, **TINY_COARSE, "sampling_steps": 1, **options},
    )


def rendered(cohort, output_dir, ckpt_dir, **options):
    """Image and, if it is kept, structure."""
    run = inference(cohort, output_dir, ckpt_dir, **options)
    run.run()
    run.finalize()
    files = [path for path in (output_dir / f"{NAME}.nii.gz", output_dir / f"structure/{NAME}.nii.gz") if path.exists()]
    return [np.asarray(nib.load(path).dataobj).astype(np.float32) for path in files]


@pytest.fixture(scope="module")
def ids(cohort):
    return np.asarray(nib.load(cohort / f"labels/{NAME}.nii.gz").dataobj)


# Rendering


def test_the_mask_is_painted_on_what_is_drawn(cohort, weights, tmp_path, ids):
    """Two masks under one noise: an untrained coarse network draws the same around them."""
    still = {"contrast_shift_hu": 0.0, "label_shift_hu": 0.0, "grain": 0.0, "mode": "mask_only"}
    shorter = np.where(ids == 9, 0, ids).astype(np.uint8)
    affine = nib.load(cohort / f"labels/{NAME}.nii.gz").affine
    nib.save(nib.Nifti1Image(shorter, affine), tmp_path / f"{NAME}.nii.gz")
    with_vessels = rendered(cohort, tmp_path / "with", weights, **still)[0]
    without = rendered(cohort, tmp_path / "without", weights, mask=tmp_path / f"{NAME}.nii.gz", **still)[0]
    change = with_vessels - without
    vessel, away = ids == 9, ndimage.distance_transform_edt(ids != 9) > 9
    assert np.median(change[vessel]) > 60
    assert np.abs(np.median(change[away])) < 5
    assert without.std() > 100, "the noise is seen"


def test_a_mode_that_gives_no_cardiac_ct_is_refused(cohort, weights, tmp_path):
    with fails_with("mode: must be one of"):
        rendered(cohort, tmp_path / "out", weights, mode="unconditional")
    assert not (tmp_path / "out").exists()


def test_there_is_grain_on_a_structure_that_can_be_kept(cohort, weights, tmp_path, ids):
    smooth_coarse = {"coarse_def#_target_": "helpers.SmoothCoarse", "save_structure": True}
    still = {**smooth_coarse, "contrast_shift_hu": 0.0, "label_shift_hu": 0.0, "mode": "mask_only"}
    chamber = ndimage.binary_erosion(ids == 3, iterations=2)
    rows = json.loads((BUNDLE / "configs/inference.json").read_text())["anatomy"]
    image, structure = rendered(cohort, tmp_path / "grain", weights, **still)
    assert abs(structure[chamber].mean() - Anatomy(rows).nominal_hu[3]) < 15
    assert structure[chamber].std() < 10
    assert 8 < (image - structure)[chamber].std() < 45, "30 HU, less what interpolation takes"
    smooth, of_smooth = rendered(cohort, tmp_path / "smooth", weights, **still, grain=0.0)
    np.testing.assert_array_equal(smooth, structure)
    np.testing.assert_array_equal(of_smooth, structure)


def test_seeds_draw_other_surroundings_and_another_contrast(cohort, weights, tmp_path, ids):
    first, again, other = (
        rendered(cohort, tmp_path / name, weights, mode="mask_only", grain=0.0, seed=seed)[0]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    np.testing.assert_array_equal(first, again)
    far = ndimage.distance_transform_edt(ids == 0) > 6
    assert np.abs(first - other)[far].mean() > 100
    heart = ndimage.binary_erosion(ids == 3)
    assert abs(np.median((first - other)[heart])) > 5


def test_a_missing_coarse_stage_is_named_with_what_to_do_and_templates_need_none(cohort, weights, tmp_path):
    (tmp_path / "models").mkdir()
    shutil.copy(weights / "model.pt", tmp_path / "models")
    with fails_with("models/coarse.pt: there is no such file; of weights: train first, or point `ckpt_dir` to a"):
        rendered(cohort, tmp_path / "out", tmp_path / "models", mode="mask_only")
    assert not [*tmp_path.glob("out/*.nii.gz")]
    rendered(cohort, tmp_path / "guided", tmp_path / "models", mode="template")
    assert (tmp_path / f"guided/{NAME}_from_subject_000.nii.gz").is_file()


def test_coarse_weights_of_another_size_are_named_with_their_option(cohort, weights, tmp_path):
    with fails_with("use the `coarse_def` (preset) they were trained with"):
        rendered(cohort, tmp_path, weights, mode="mask_only", **{"coarse_def#channels": [16, 16]})


def test_other_coarse_weights_are_another_run(cohort, weights, tmp_path):
    shutil.copytree(weights, tmp_path / "models")
    rendered(cohort, tmp_path / "out", tmp_path / "models", mode="mask_only")
    state = torch.load(tmp_path / "models/coarse.pt", weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "models/coarse.pt")
    with fails_with("rendering.json belongs to another run"):
        rendered(cohort, tmp_path / "out", tmp_path / "models", mode="mask_only")


@pytest.mark.parametrize(("voxel_mm", "rendered_at_mm"), [(0.5, 0.8), (1.0, 1.0), (2.0, 1.5)])
def test_a_mask_is_rendered_at_its_voxel_size_within_the_default_limits(
    cohort, weights, tmp_path, voxel_mm, rendered_at_mm
):
    label = np.zeros((40, 36, 32), np.uint8)
    label[10:30, 10:26, 10:22] = 3
    nib.save(nib.Nifti1Image(label, np.diag([voxel_mm] * 3 + [1])), tmp_path / f"{NAME}.nii.gz")
    default = json.loads((BUNDLE / "configs/inference.json").read_text())["spacing_mm"]
    run = inference(
        cohort, tmp_path / "out", weights, mask=tmp_path / f"{NAME}.nii.gz", mode="mask_only", spacing_mm=default
    )
    item = run.parser.get_parsed_content("dataset")[0]
    np.testing.assert_allclose(item["label"].pixdim, rendered_at_mm, rtol=1e-4)
    assert item["context"].shape[1:] == item["label"].shape[1:]
    size_mm = np.array(item["label"].shape[1:]) * rendered_at_mm
    assert np.abs(size_mm - np.array(label.shape) * voxel_mm).max() < 2 * rendered_at_mm


# Training


def coarse_training(cohort, folder, **options):
    places = {"dataset_dir": str(cohort), "output_dir": str(folder), "ckpt_dir": str(folder / "models")}
    return workflow_of(BUNDLE)("train.json", "train_coarse.json", **{**places, **COARSE_TRAINING, **options})


def test_a_killed_coarse_training_resumes_to_the_same_weights_which_inference_loads(cohort, weights, tmp_path):
    coarse_training(cohort, tmp_path / "whole").run()

    def kill(engine):
        raise KeyboardInterrupt

    broken = coarse_training(cohort, tmp_path / "broken")
    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), kill)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    coarse_training(cohort, tmp_path / "broken").run()
    whole, resumed = (
        torch.load(tmp_path / name / "models/coarse.pt", weights_only=True) for name in ("whole", "broken")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert whole["unet.out.2.conv.weight"].any(), "it starts at zero and must have been trained"
    assert not (tmp_path / "whole/models/model.pt").exists()
    assert "minus_held_out_loss" in (tmp_path / "whole/metrics.csv").read_text()
    shutil.copy(weights / "model.pt", tmp_path / "whole/models")
    assert rendered(cohort, tmp_path / "out", tmp_path / "whole/models", mode="mask_only")[0].std() > 0


def test_without_validation_the_last_coarse_weights_are_kept(cohort, tmp_path):
    coarse_training(cohort, tmp_path, max_epochs=1, val_interval=0).run()
    assert [path.name for path in (tmp_path / "models").glob("*.pt")] == ["coarse.pt"]


def test_a_field_of_view_below_the_roi_of_the_coarse_stage_is_refused_by_name(cohort, tmp_path):
    with fails_with("lower `roi_size`, or use a larger field of view"):
        coarse_training(cohort, tmp_path, roi_size=[32, 32, 32]).run()
