"""The bundle's configs do what they say, on files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.diffusion.context import Context
from helpers import BUNDLE, CONFIGS, ROOT, TINY, TINY_COARSE, TINY_TRAINING, fails_with, template_of, write_oriented
from ignite.engine import Events
from monai.bundle import ConfigParser
from scipy import ndimage

SHARED_BLOCKS = ("anatomy", "label_mapping", "labels", "spacing_mm", "amp", "network_def")


def render(workflow, masks, template, output_dir, weights, **overrides):
    run = workflow(
        "inference.json",
        workflow_type="infer",
        target_masks=[str(m) for m in masks],
        templates=[template],
        output_dir=str(output_dir),
        ckpt_dir=str(weights),
        **{**TINY, "sampling_steps": 2, **overrides},
    )
    run.run()
    run.finalize()


def test_blocks_that_stand_in_two_configs_agree():
    train, inference = (json.loads((CONFIGS / name).read_text()) for name in ("train.json", "inference.json"))
    for block in SHARED_BLOCKS:
        assert train[block] == inference[block], block


def test_metadata_version_is_in_the_changelog():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize(("name", "kind"), [("train.json", "train"), ("inference.json", "infer")])
def test_required_properties_are_present(workflow, cohort, tmp_path, weights, name, kind):
    overrides = {
        "dataset_dir": str(cohort),
        "output_dir": str(tmp_path),
        **(TINY_TRAINING if kind == "train" else TINY),
    }
    if kind == "infer":
        template = template_of(cohort)
        overrides |= {"target_masks": [template["label"]], "templates": [template], "ckpt_dir": str(weights)}
    assert not workflow(name, workflow_type=kind, **overrides).check_properties()


def test_training_writes_everything_it_promises(workflow, cohort, tmp_path):
    run = workflow(
        "train.json",
        mlflow=True,
        dataset_dir=str(cohort),
        output_dir=str(tmp_path),
        ckpt_dir=str(tmp_path / "models"),
        **TINY_TRAINING,
    )
    run.run()
    run.finalize()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"label_mean_score", "grain_ratio", "vessel_contrast_ratio", "vessel_cl_dice"} <= set(rows[0])
    assert (tmp_path / "previews/epoch_0002.png").stat().st_size > 10_000
    assert (tmp_path / "mlflow.db").exists()
    times = (200, 400, 600, 800)
    assert {f"remaining_{place}_{t}" for place in ("edge", "elsewhere") for t in times} <= set(rows[0])
    state = torch.load(tmp_path / "resume.pt", weights_only=True)["network"]
    last_layers = [state[f"{part}.out.2.conv.weight"] for part in ("regressor", "unet")]
    assert all(bool(layer.any()) for layer in last_layers), "both networks start at zero and must have been trained"


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "resume.pt", weights_only=False)


def test_killed_training_resumes_to_the_same_weights(workflow, cohort, tmp_path):
    def start(name):
        directory = tmp_path / name
        overrides = {**TINY_TRAINING, "max_epochs": 3, "dataset_dir": str(cohort), "output_dir": str(directory)}
        return workflow("train.json", ckpt_dir=str(directory / "models"), **overrides)

    start("whole").run()

    def kill(engine):
        raise KeyboardInterrupt

    broken = start("broken")
    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), kill)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    start("broken").run()
    whole, resumed = final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken")
    for part in ("network", "ema"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), (part, key)
    best = [torch.load(tmp_path / name / "models/model.pt", weights_only=True) for name in ("whole", "broken")]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())


def test_evaluation_writes_metrics_of_the_test_cases(workflow, cohort, tmp_path, weights):
    run = workflow(
        "train.json",
        "evaluate.json",
        workflow_type="train",
        dataset_dir=str(cohort),
        output_dir=str(tmp_path),
        ckpt_dir=str(weights),
        **TINY_TRAINING,
    )
    run.run()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["label_mean_score"] > -60, "a network that keeps to the prior must land near the template's means"
    assert metrics["grain_ratio"] > 0
    assert metrics["label_wasserstein"] >= -metrics["label_mean_score"]  # a difference of means is transported, too
    assert 0 <= metrics["vessel_centreline_recovered"] <= 1
    assert {"vessel_attached", "vessel_betti_error_0", "vessel_betti_error_1", "vessel_betti_error_2"} <= set(metrics)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "oblique", "anisotropic"])
def test_rendering_lies_on_the_grid_of_its_mask(workflow, cohort, tmp_path, weights, orientation):
    label, affine = write_oriented(cohort / "labels/subject_003.nii.gz", tmp_path / "target.nii.gz", orientation)
    render(workflow, [tmp_path / "target.nii.gz"], template_of(cohort), tmp_path / "out", weights)
    rendered = nib.load(tmp_path / "out/target_from_subject_000.nii.gz")
    assert rendered.shape == label.shape
    assert rendered.get_data_dtype() == np.int16
    np.testing.assert_allclose(rendered.affine, affine, atol=1e-3)
    template_image = np.asarray(nib.load(cohort / "images/subject_000.nii.gz").dataobj)
    template_label = np.asarray(nib.load(cohort / "labels/subject_000.nii.gz").dataobj)
    image = np.asarray(rendered.dataobj)
    for chamber in (2, 3, 4, 5):  # without their rims: voxels of 3 mm are interpolated to 2.5 mm
        inside, template_inside = (ndimage.binary_erosion(ids == chamber) for ids in (label, template_label))
        assert abs(image[inside].mean() - template_image[template_inside].mean()) < 40, chamber


def test_second_run_keeps_complete_results_and_makes_missing_ones_alike(workflow, cohort, tmp_path, weights):
    masks = [cohort / f"labels/subject_00{i}.nii.gz" for i in (2, 3)]
    render(workflow, masks, template_of(cohort), tmp_path, weights)
    first, second = (tmp_path / f"subject_00{i}_from_subject_000.nii.gz" for i in (2, 3))
    kept, made = first.stat().st_mtime_ns, np.asarray(nib.load(second).dataobj)
    second.unlink()
    render(workflow, masks, template_of(cohort), tmp_path, weights)
    assert first.stat().st_mtime_ns == kept
    np.testing.assert_array_equal(np.asarray(nib.load(second).dataobj), made)
    render(workflow, masks, template_of(cohort), tmp_path, weights)  # nothing left to do is no error


def test_a_rendering_cut_short_is_made_again_and_what_a_kill_left_is_removed(workflow, cohort, tmp_path, weights):
    mask = cohort / "labels/subject_002.nii.gz"
    render(workflow, [mask], template_of(cohort), tmp_path, weights)
    path = tmp_path / "subject_002_from_subject_000.nii.gz"
    made = np.asarray(nib.load(path).dataobj)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    left = tmp_path / ".part_elsewhere_7_subject_002_from_subject_000.nii.gz"
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    render(workflow, [mask], template_of(cohort), tmp_path, weights)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), made)
    assert not left.exists()


def test_full_disk_leaves_no_partial_file(workflow, cohort, tmp_path, weights, monkeypatch):
    def no_space(image, filename):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", no_space)
    with pytest.raises(RuntimeError):
        render(workflow, [cohort / "labels/subject_003.nii.gz"], template_of(cohort), tmp_path / "out", weights)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == [".shard_0.lock", "rendering.json"]


def test_masks_of_one_name_do_not_pass_for_each_other_and_neither_do_other_options(workflow, cohort, tmp_path, weights):
    masks = [tmp_path / f"p{k}/ct.nii.gz" for k in (1, 2, 3)]
    for mask, subject in zip(masks, (2, 3, 2), strict=True):
        mask.parent.mkdir()
        shutil.copy(cohort / f"labels/subject_{subject:03d}.nii.gz", mask)
    options = {**TINY_COARSE, "mode": "mask_only", "spacing_mm": [5.0, 5.0, 5.0]}
    render(workflow, masks[:1], template_of(cohort), tmp_path / "out", weights, **options)
    before = (tmp_path / "out/ct.nii.gz").read_bytes()
    with fails_with(f"out/ct.nii.gz: was rendered from {masks[0]}, which "):
        render(workflow, masks[1:2], template_of(cohort), tmp_path / "out", weights, **options)
    with fails_with("rendering.json belongs to another run (seed: 0 there, 1 now)"):
        render(workflow, masks[:1], template_of(cohort), tmp_path / "out", weights, seed=1, **options)
    render(workflow, masks[2:], template_of(cohort), tmp_path / "out", weights, **options)  # the same mask, moved
    assert (tmp_path / "out/ct.nii.gz").read_bytes() == before


def test_template_missing_a_label_is_painted_and_warned_about(workflow, cohort, tmp_path, weights, capsys):
    template = template_of(cohort)
    source = nib.load(template["label"])
    data = np.asarray(source.dataobj).copy()
    data[data == 8] = 0
    template["label"] = str(tmp_path / "without_appendage.nii.gz")
    nib.save(nib.Nifti1Image(data, source.affine), template["label"])
    render(workflow, [cohort / "labels/subject_003.nii.gz"], template, tmp_path / "out", weights)
    assert "the template shows no label [8]" in capsys.readouterr().out


def test_weights_of_another_preset_are_named(workflow, cohort, tmp_path, weights):
    with fails_with("not weights of the configured network"):
        render(
            workflow,
            [cohort / "labels/subject_003.nii.gz"],
            template_of(cohort),
            tmp_path,
            weights,
            **{"network_def#channels": [8, 16]},
        )


def test_weights_of_an_older_network_are_refused_with_what_to_do(workflow, cohort, tmp_path, weights):
    state = torch.load(weights / "model.pt", weights_only=True)
    torch.save({**state, "moments.table": torch.ones(3, 6, 8)}, tmp_path / "model.pt")
    with fails_with(f"{tmp_path}/model.pt: these weights were trained by version 0.3.0 or older, for another"):
        render(workflow, [cohort / "labels/subject_003.nii.gz"], template_of(cohort), tmp_path / "out", tmp_path)


def volume_in(path):
    return np.asarray(nib.load(path).dataobj).astype(np.float32)


def test_grain_is_put_on_a_structure_that_can_be_kept(workflow, cohort, tmp_path, weights):
    mask, name = cohort / "labels/subject_003.nii.gz", "subject_003_from_subject_000.nii.gz"
    inside = ndimage.binary_erosion(np.isin(volume_in(mask), (2, 3, 4, 5)), iterations=2)

    def rendered(folder, **options):
        options = {"sample_strength": 0.0, "save_structure": True, **options}
        render(workflow, [mask], template_of(cohort), tmp_path / folder, weights, **options)
        return [volume_in(tmp_path / folder / place / name) for place in ("", "structure")]

    smooth, of_smooth = rendered("smooth", grain=0.0)
    np.testing.assert_array_equal(smooth, of_smooth)
    whole, of_whole = rendered("whole")
    np.testing.assert_array_equal(of_whole, of_smooth)
    half, _ = rendered("half", grain=0.5)
    ratio = (half - of_whole)[inside].std() / (whole - of_whole)[inside].std()
    assert 0.35 < ratio < 0.65, "half the grain"
    sample, _ = rendered("sample", grain=0.0, sample_strength=1.0)
    assert 3 < (sample - smooth)[inside].std() < 15, "10 HU of remainder, resampled"
    render(workflow, [mask], template_of(cohort), tmp_path / "plain", weights)
    assert not (tmp_path / "plain/structure").exists()


@pytest.mark.parametrize("preset", [[], ["preset_demo.json"], ["preset_full.json"]], ids=str)
def test_crops_of_every_preset_fit_the_network_without_padding(preset):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", *preset)])
    multiple = 2 ** len(parser.get_parsed_content("network_def#channels"))
    assert parser.get_parsed_content("network_def").size_multiple == multiple
    assert [n % multiple for n in parser.get_parsed_content("roi_size")] == [0, 0, 0]
    assert 0 < parser.get_parsed_content("moments_epochs") < parser.get_parsed_content("max_epochs")


def test_the_metadata_name_the_channels_of_the_context():
    data_format = json.loads((CONFIGS / "metadata.json").read_text())["network_data_format"]
    context = data_format["inputs"]["context"]
    assert context["num_channels"] == len(context["channel_def"]) == len(Context._fields)
    for name, field in zip(context["channel_def"].values(), Context._fields, strict=True):
        assert name.replace(" ", "_") == field.removesuffix("_hu")


def test_a_training_of_moments_alone_says_so(workflow, cohort, tmp_path, capsys):
    options = {**TINY_TRAINING, "max_epochs": 1, "moments_epochs": 3, "val_interval": 0, "output_dir": str(tmp_path)}
    workflow("train.json", dataset_dir=str(cohort), ckpt_dir=str(tmp_path / "models"), **options).run()
    assert "moments_epochs 3 of max_epochs 1: the U-Net is not trained" in capsys.readouterr().out
    state = torch.load(tmp_path / "models/model.pt", weights_only=True)
    trained = {part: bool(state[f"{part}.out.2.conv.weight"].any()) for part in ("regressor", "unet")}
    assert trained == {"regressor": True, "unet": False}


def test_missing_weights_are_named(workflow, cohort, tmp_path):
    with fails_with("model.pt: there is no such file; of weights: train first, or point `ckpt_dir`"):
        render(workflow, [cohort / "labels/subject_003.nii.gz"], template_of(cohort), tmp_path, tmp_path / "nowhere")


def test_command_line_runs_from_a_foreign_directory(cohort, tmp_path):
    overrides = {
        **TINY_TRAINING,
        "max_epochs": 1,
        "dataset_dir": str(cohort),
        "output_dir": str(tmp_path / "out"),
        "ckpt_dir": str(tmp_path / "out/models"),
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "training",
        "--config_file",
        str(CONFIGS / "train.json"),
        "--bundle_root",
        str(BUNDLE),
    ]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/models/model.pt").exists()


@pytest.mark.slow
def test_two_processes_train_together(cohort, tmp_path):
    overrides = {
        **TINY_TRAINING,
        "dataset_dir": str(cohort),
        "output_dir": str(tmp_path / "out"),
        "ckpt_dir": str(tmp_path / "out/models"),
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    configs = f"['{CONFIGS / 'train.json'}','{CONFIGS / 'multi_gpu_train.json'}']"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "monai.bundle",
        "run",
        "training",
    ]
    done = subprocess.run(
        [*command, "--config_file", configs, "--bundle_root", str(BUNDLE), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/models/model.pt").exists()
