"""The configs of the segmentation bundle do what they say, on files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.volumes.anatomy import Anatomy
from helpers import SEG_BUNDLE, fails_with, write_oriented
from ignite.engine import Events
from monai.utils import set_determinism
from scipy import ndimage

CONFIGS = SEG_BUNDLE / "configs"
SHARED_BLOCKS = ("anatomy", "label_mapping", "spacing_mm", "intensity_hu", "roi_size", "amp")
TINY = {
    "spacing_mm": [4.0, 4.0, 4.0],
    "roi_size": [16, 16, 16],
    "roi_margin": 8,
    "network_def#init_filters": 8,
    "network_def#blocks_down": [1, 1],
    "network_def#blocks_up": [1],
    "samples_per_epoch": 4,
    "max_epochs": 2,
    "val_interval": 1,
}
THRESHOLD_HU = 300.0


@pytest.fixture(scope="session")
def synthetic(cohort, tmp_path_factory):
    """The training phantoms as a synthetic set: with confidence and score."""
    folder = tmp_path_factory.mktemp("synthetic")
    items = []
    for number, score in ((0, 12.0), (1, 30.0)):
        image, label = (cohort / kind / f"subject_00{number}.nii.gz" for kind in ("images", "labels"))
        source = nib.load(label)
        trust = np.random.default_rng(number).uniform(0.05, 1, source.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(trust, source.affine), folder / f"confidence_{number}.nii.gz")
        item = {"image": str(image), "label": str(label), "confidence": f"confidence_{number}.nii.gz"}
        items.append(item | {"score_hu": score})
    (folder / "datalist.json").write_text(json.dumps({"training": items, "rejected": []}))
    return folder / "datalist.json"


def places(tmp_path, **more):
    return {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models"), **TINY, **more}


def state_of(path):
    return torch.load(path, weights_only=True)


def test_blocks_that_stand_in_two_configs_agree():
    train, inference = (json.loads((CONFIGS / name).read_text()) for name in ("train.json", "inference.json"))
    for block in SHARED_BLOCKS:
        assert train[block] == inference[block], block
    theirs = dict(train["network_def"], out_channels="@num_labels")
    assert theirs == inference["network_def"], "but for where the number of labels comes from"
    evaluation = json.loads((CONFIGS / "evaluate.json").read_text())
    written = inference["postprocessing"]["transforms"]
    judged = json.loads(json.dumps(evaluation["validate#postprocessing"]["transforms"]).replace("@validate#", "@"))
    assert judged == written, "what is judged must be what is written"


def test_metadata_names_the_labels_in_order_and_its_own_version():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    names = Anatomy(json.loads((CONFIGS / "train.json").read_text())["anatomy"]).names
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {str(i): name for i, name in enumerate(names)}
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize("names", [("train.json",), ("train.json", "pretrain.json"), ("train.json", "evaluate.json")])
def test_required_properties_of_training_are_present(seg_workflow, cohort, synthetic, tmp_path, names):
    run = seg_workflow(*names, dataset_dir=str(cohort), synthetic_datalists=[str(synthetic)], **places(tmp_path))
    assert not run.check_properties()


def test_required_properties_of_inference_are_present(seg_workflow, cohort, tmp_path):
    run = seg_workflow("inference.json", workflow_type="infer", images=[str(cohort / "images/subject_003.nii.gz")])
    assert not run.check_properties()


def test_training_writes_everything_it_promises(seg_workflow, cohort, tmp_path):
    run = seg_workflow("train.json", mlflow=True, dataset_dir=str(cohort), **places(tmp_path))
    run.run()
    run.finalize()
    with (tmp_path / "out/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"mean_dice", "vessel_cl_dice"} <= set(rows[0])
    assert (tmp_path / "out/mlflow.db").exists()
    assert (tmp_path / "models/model.pt").exists()
    assert not (tmp_path / "out/resume.pt").exists(), "a finished run must leave room for the next"


def test_pretraining_is_followed_by_fine_tuning(seg_workflow, cohort, synthetic, tmp_path, caplog):
    options = places(tmp_path, dataset_dir=str(cohort), learning_rate=1e-9)
    run = seg_workflow(
        "train.json",
        "pretrain.json",
        synthetic_datalists=[str(synthetic)],
        real_datalists=[str(cohort / "datalist.json")],
        warmup_epochs=1,
        ramp_epochs=0,
        **{**options, "learning_rate": 1e-3},
    )
    run.run()
    assert run.parser.get_parsed_content("loss").gamma == 1, "the last epoch must trust the confidence"
    pretrained = state_of(tmp_path / "models/pretrained.pt")
    seg_workflow("train.json", **options).run()  # a step so small that it shows where training started
    tuned = state_of(tmp_path / "models/model.pt")
    for key, value in pretrained.items():
        torch.testing.assert_close(tuned[key], value, atol=1e-5, rtol=0)


def test_without_validation_cases_the_last_weights_are_kept(seg_workflow, cohort, tmp_path):
    run = seg_workflow("train.json", dataset_dir=str(cohort), **places(tmp_path), **{"validate#dataset#data": []})
    run.run()
    network = run.parser.get_parsed_content("network_def").state_dict()
    kept = state_of(tmp_path / "models/model.pt")
    assert all(torch.equal(network[key].cpu(), value) for key, value in kept.items())


def test_a_training_shorter_than_its_validation_interval_is_validated_at_its_end(seg_workflow, cohort, tmp_path):
    options = places(tmp_path, max_epochs=1, val_interval=5)
    seg_workflow("train.json", dataset_dir=str(cohort), **options).run()
    assert (tmp_path / "models/model.pt").exists()


def test_an_interrupted_run_is_not_continued_with_other_options(seg_workflow, cohort, tmp_path):
    def start(**options):
        return seg_workflow("train.json", dataset_dir=str(cohort), **places(tmp_path, **options))

    def kill(engine):
        raise KeyboardInterrupt

    broken = start()
    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), kill)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    with fails_with("resume.pt: is of an interrupted run with max_epochs 2, now 7"):
        start(max_epochs=7).run()


def test_training_stops_when_validation_no_longer_improves(seg_workflow, cohort, tmp_path):
    options = places(tmp_path, learning_rate=0.0, patience=2, max_epochs=9)
    run = seg_workflow("train.json", dataset_dir=str(cohort), **options)
    run.run()
    assert run.trainer.state.epoch == 3


def test_killed_pretraining_resumes_to_the_same_weights(seg_workflow, cohort, synthetic, tmp_path):
    def start(name):
        options = places(tmp_path / name, max_epochs=3, warmup_epochs=0, ramp_epochs=1, dataset_dir=str(cohort))
        return seg_workflow("train.json", "pretrain.json", synthetic_datalists=[str(synthetic)], **options)

    def kill(engine):
        raise KeyboardInterrupt

    start("whole").run()
    broken = start("broken")
    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), kill)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = start("broken")
    again.run()
    whole, resumed = (state_of(tmp_path / name / "models/pretrained.pt") for name in ("whole", "broken"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_image_label_and_confidence_stay_aligned_in_crops_and_augmentation(seg_workflow, cohort, tmp_path):
    label = nib.load(cohort / "labels/subject_000.nii.gz")
    ids = np.asarray(label.dataobj)
    files = {"label": str(cohort / "labels/subject_000.nii.gz")}
    for key, values in (("image", 100.0 * ids - 200), ("confidence", ids / 20)):
        files[key] = str(tmp_path / f"{key}.nii.gz")
        nib.save(nib.Nifti1Image(values.astype(np.float32), label.affine), files[key])
    (tmp_path / "list.json").write_text(json.dumps({"training": [files]}))
    run = seg_workflow(
        "train.json",
        "pretrain.json",
        synthetic_datalists=[str(tmp_path / "list.json")],
        dataset_dir=str(cohort),
        **places(tmp_path),
    )
    transform = run.parser.get_parsed_content("train#preprocessing")
    case = run.parser.get_parsed_content("train#dataset#data")[0]
    transform.set_random_state(seed=0)
    for t in transform.transforms:  # intensities are to tell the label
        if type(t).__name__.startswith(("RandAdjust", "RandGaussian", "RandScale", "RandShift")):
            t.prob = 0.0
    seen = set()
    for _ in range(6):
        item = transform(case)[0]
        found = item["label"][0].numpy()
        assert found.shape == tuple(TINY["roi_size"])
        inside = ndimage.minimum_filter(found, 3) == ndimage.maximum_filter(found, 3)
        inside &= ndimage.binary_erosion(inside, border_value=0)
        for key, scale in (("confidence", 20), ("image", 10)):  # a thin label can vanish between the voxels of the grid
            error = np.abs(item[key][0].numpy()[inside] - found[inside] / scale)
            assert (error < 1e-3).mean() > 0.99, key
        seen |= set(np.unique(found[inside]).tolist())
    assert len(seen) > 3, "the crops must show several labels"


def save_threshold(path, label=1):
    """Weights of a 1^3 convolution that gives `label` to what is brighter than THRESHOLD_HU, and a config of it."""
    network = torch.nn.Conv3d(1, 11, 1)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.fill_(-1000.0)
        network.weight[label] = 40.0
        network.bias[[0, label]] = torch.tensor([0.0, -40.0 * (THRESHOLD_HU + 200) / 1000])
    path.mkdir()
    torch.save(network.state_dict(), path / "model.pt")
    return {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 11, "kernel_size": 1}


def segment_by_threshold(seg_workflow, folder, label=1):
    """What `inference.json` makes of `folder/image.nii.gz` with the network of `save_threshold`."""
    run = seg_workflow(
        "inference.json",
        workflow_type="infer",
        images=[str(folder / "image.nii.gz")],
        output_dir=str(folder / "out"),
        ckpt_dir=str(folder / "models"),
        network_def=save_threshold(folder / "models", label),
        spacing_mm=[2.0, 2.0, 2.0],
    )
    run.run()
    return nib.load(folder / "out/image_seg.nii.gz")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "oblique", "anisotropic"])
def test_segmentation_lies_on_the_grid_of_its_image(seg_workflow, cohort, tmp_path, orientation):
    label, affine = write_oriented(cohort / "labels/subject_003.nii.gz", tmp_path / "target.nii.gz", orientation)
    blood = ndimage.gaussian_filter(np.isin(label, (2, 3, 4, 5)).astype(np.float32), 1.5)
    image = -500 + 1600 * blood
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    found = segment_by_threshold(seg_workflow, tmp_path)
    assert found.shape == label.shape
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, affine, atol=1e-3)
    predicted, expected = np.asarray(found.dataobj) == 1, image > THRESHOLD_HU
    assert 2 * (predicted & expected).sum() / (predicted.sum() + expected.sum()) > 0.97


def test_images_of_one_name_in_different_folders_keep_their_own_segmentation(seg_workflow, tmp_path):
    images = []
    for name, value in (("a", -500.0), ("b", 1000.0)):
        (tmp_path / name).mkdir()
        images.append(str(tmp_path / name / "ct.nii.gz"))
        values = np.full((9, 9, 9), value, np.float32)
        values[1, 1, 1] = -200  # else it would be refused; too little to change a label
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2, 2, 1])), images[-1])
    seg_workflow(
        "inference.json",
        workflow_type="infer",
        images=images,
        output_dir=str(tmp_path / "out"),
        ckpt_dir=str(tmp_path / "models"),
        network_def=save_threshold(tmp_path / "models"),
    ).run()
    for name, label in (("a", 0), ("b", 1)):
        found = np.asarray(nib.load(tmp_path / f"out/{name}/ct_seg.nii.gz").dataobj)
        assert np.unique(found).tolist() == [label]


def test_nothing_to_segment_is_said(seg_workflow, tmp_path):
    run = seg_workflow("inference.json", workflow_type="infer", dataset_dir=str(tmp_path), ckpt_dir=str(tmp_path))
    with pytest.raises(SystemExit, match="no image to segment: set `images`"):
        run.run()


@pytest.mark.parametrize(("label", "pieces"), [(1, 1), (6, 2), (9, 3)])
def test_stray_pieces_of_chambers_and_aorta_are_dropped(seg_workflow, tmp_path, label, pieces):
    """Three bright blocks, 8, 6 and 4 voxels wide. The aorta leaves a scan of the heart and comes back: two pieces."""
    image = np.full((48, 16, 16), -500.0, np.float32)
    for start, width in ((2, 8), (18, 6), (34, 4)):
        image[start : start + width, 4 : 4 + width, 4 : 4 + width] = 1000
    nib.save(nib.Nifti1Image(image, np.diag([2.0, 2, 2, 1])), tmp_path / "image.nii.gz")
    found = np.asarray(segment_by_threshold(seg_workflow, tmp_path, label).dataobj)
    assert set(np.unique(found)) == {0, label}
    sizes = [int((part == label).sum()) for part in (found[:14], found[14:30], found[30:])]
    assert sizes == [512, 216, 64][:pieces] + [0] * (3 - pieces)


def test_evaluation_measures_every_label_on_the_grid_of_the_file(seg_workflow, cohort, tmp_path):
    run = seg_workflow(
        "train.json",
        "evaluate.json",
        dataset_dir=str(cohort),
        **{**places(tmp_path), "network_def": save_threshold(tmp_path / "models"), "spacing_mm": [2.5, 2.5, 2.5]},
    )
    run.run()
    with (tmp_path / "out/labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"subject_003"}
    assert len(rows) == 10
    assert rows[8]["label"] == "coronary arteries"
    assert 0 <= float(rows[8]["cl_dice"]) <= 1
    image, label = (np.asarray(nib.load(cohort / f"{k}/subject_003.nii.gz").dataobj) for k in ("images", "labels"))
    parts, _ = ndimage.label(image > THRESHOLD_HU, np.ones((3, 3, 3)))
    predicted, truth = parts == np.bincount(parts.flat)[1:].argmax() + 1, label == 1  # of label 1, one piece is kept
    dice = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    assert float(rows[0]["dice"]) == pytest.approx(dice, abs=0.02)
    text = (tmp_path / "out/metrics.json").read_text()
    assert "NaN" not in text
    metrics = json.loads(text)
    assert {"dice", "hd95_mm", "nsd", "cl_dice", "betti_error_0", "dice LV myocardium"} <= set(metrics)
    missed = [row["label"] for row in rows if row["missed"] == "1"]  # the threshold finds one label only
    assert metrics["missed"] == len(missed) == 9
    assert metrics["missed coronary arteries"] == 1
    assert metrics["attached"] == metrics["attached coronary arteries"] == 0
    assert metrics["hd95_mm coronary arteries"] == pytest.approx(2.5 * 58 * 3**0.5)
    assert (tmp_path / "out/pictures/subject_003.png").stat().st_size > 5_000


def test_all_missing_files_are_named_before_training(seg_workflow, cohort, synthetic, tmp_path):
    content = json.loads(synthetic.read_text())
    for number, item in enumerate(content["training"]):
        item |= {"image": f"nowhere_{number}.nii.gz", "confidence": str(synthetic.parent / item["confidence"])}
    (tmp_path / "list.json").write_text(json.dumps(content))
    run = seg_workflow(
        "train.json",
        "pretrain.json",
        synthetic_datalists=[str(tmp_path / "list.json")],
        dataset_dir=str(cohort),
        **places(tmp_path),
    )
    with fails_with("2 listed files do not exist"):
        run.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("label", "label ids [77] are not in the label map 0 to 10"),
        ("empty", "the mask is empty; every case needs at least one label"),
        ("confidence", "confidence must lie between 0 and 1, got 0.05"),
        ("grid", "they must share one grid"),
    ],
)
def test_bad_volumes_are_named_before_the_first_step(seg_workflow, cohort, synthetic, tmp_path, change, message):
    item = json.loads(synthetic.read_text())["training"][0]
    item["confidence"] = str(synthetic.parent / item["confidence"])
    key = "confidence" if change in ("confidence", "grid") else "label"
    source = nib.load(item[key])
    values, affine = np.asarray(source.dataobj).copy(), source.affine.copy()
    if change == "label":
        values[0, 0, 0] = 77
    elif change == "empty":
        values[:] = 0
    elif change == "confidence":
        values[0, 0, 0] = 7.0
    else:
        affine[0, 3] += 5
    item[key] = str(tmp_path / f"bad_{key}.nii.gz")
    nib.save(nib.Nifti1Image(values, affine), item[key])
    (tmp_path / "list.json").write_text(json.dumps({"training": [item]}))
    run = seg_workflow(
        "train.json",
        "pretrain.json",
        synthetic_datalists=[str(tmp_path / "list.json")],
        dataset_dir=str(cohort),
        **places(tmp_path),
    )
    with fails_with(message):
        run.run()
    assert not (tmp_path / "models/pretrained.pt").exists()


def test_weights_of_another_network_are_named(seg_workflow, cohort, tmp_path):
    (tmp_path / "models").mkdir()
    torch.save(torch.nn.Conv3d(1, 2, 1).state_dict(), tmp_path / "models/pretrained.pt")
    run = seg_workflow("train.json", dataset_dir=str(cohort), **places(tmp_path))
    with fails_with("these are not weights of the configured network"):
        run.run()


def test_command_line_runs_from_a_foreign_directory(cohort, tmp_path):
    options = {**places(tmp_path), "dataset_dir": str(cohort), "max_epochs": 1}
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(CONFIGS / "train.json")]
    arguments = ["--bundle_root", str(SEG_BUNDLE), *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "models/model.pt").exists()


@pytest.mark.slow
def test_two_processes_train_together(cohort, tmp_path):
    options = {**places(tmp_path), "dataset_dir": str(cohort)}
    configs = f"['{CONFIGS / 'train.json'}','{CONFIGS / 'multi_gpu_train.json'}']"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "monai.bundle", "run", "training", "--config_file", configs]
    arguments = ["--bundle_root", str(SEG_BUNDLE), *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "models/model.pt").exists()


@pytest.fixture(autouse=True)
def leave_randomness_as_it_was():
    yield
    set_determinism(None)
