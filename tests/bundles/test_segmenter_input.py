"""Images and weights that `inference.json` of the segmenter refuses, and where it writes what it makes of good ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.runs.files import part_of
from helpers import BAD_IMAGES, fails_with, messages_of, write_bad_image
from monai.utils import set_determinism

NETWORK = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 11, "kernel_size": 1}


@pytest.fixture(autouse=True)
def leave_randomness_as_it_was() -> Iterator[None]:
    yield
    set_determinism(None)


@pytest.fixture
def segment(seg_workflow, tmp_path):
    """Run inference.json on images with a network of one convolution; results are in `out`."""

    def run(images: Any, weights: float = 0.0, **options: Any) -> None:
        network = torch.nn.Conv3d(1, 11, 1)
        with torch.no_grad():
            network.weight.fill_(weights)
            network.bias.fill_(weights)
        (tmp_path / "models").mkdir(exist_ok=True)
        torch.save(network.state_dict(), tmp_path / "models/model.pt")
        options = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "out"), **options}
        options = {"network_def": NETWORK, "spacing_mm": [3.0, 3.0, 3.0], **options}
        seg_workflow("inference.json", workflow_type="infer", images=images, **options).run()

    return run


def write_image(path: Path) -> str:
    """A small image that is segmented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.linspace(-1000, 500, 9**3).reshape(9, 9, 9).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2, 2, 1])), path)
    return str(path)


def results(folder: Path) -> list[str]:
    """All files below a folder, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image_that_training_refuses_is_refused_by_file_rule_and_remedy(segment, cohort, tmp_path, name):
    bad = write_bad_image(name, cohort, tmp_path / f"{name}.nii.gz")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        segment([bad])
    innermost = messages_of(caught.value)[-1]
    assert all(text in innermost for text in (f"{bad}: ", *BAD_IMAGES[name])), innermost
    assert not (tmp_path / "out").exists()


def test_images_before_a_bad_one_are_kept(segment, cohort, tmp_path):
    bad, good = write_bad_image("one_nan", cohort, tmp_path / "bad.nii.gz"), write_image(tmp_path / "good.nii.gz")
    with fails_with("holds NaN or infinite voxels"):
        segment([good, bad])
    assert results(tmp_path / "out") == ["good_seg.nii.gz"]


def test_weights_that_are_not_finite_write_nothing(segment, tmp_path):
    with fails_with(str(tmp_path / "models/model.pt")):
        segment([write_image(tmp_path / "ct.nii.gz")], weights=np.nan)
    assert not (tmp_path / "out").exists()


def test_prediction_that_is_not_finite_is_refused_by_image_before_anything_is_written(segment, tmp_path):
    image = write_image(tmp_path / "ct.nii.gz")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        segment([image], weights=3e38)  # finite, unlike what they give
    innermost = messages_of(caught.value)[-1]
    assert f"{image}: the result is NaN or infinite in" in innermost
    assert "use the weights (`ckpt_dir`) of a training that did not diverge" in innermost
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_or_of_another_network_are_named(segment, tmp_path):
    image = write_image(tmp_path / "ct.nii.gz")
    with fails_with("elsewhere/model.pt: no weights; train first, or point `ckpt_dir` to a folder with model.pt"):
        segment([image], ckpt_dir=str(tmp_path / "elsewhere"))
    with fails_with("models/model.pt: these are not weights of the configured network"):
        segment([image], network_def=NETWORK | {"kernel_size": 3})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("ct.nii.gz", {}, "images: must be a list of files, got the text 'ct.nii.gz'; write ['ct.nii.gz']"),
        (["ct.nii.gz", "nowhere.nii.gz"], {}, "images: 1 listed files do not exist: "),
        (["ct.nii.gz", "ct.nii"], {}, "images: file names must differ, they give ['ct_seg'] more than once"),
        (["ct.nii.gz"], {"images_root": "other"}, "images_root: must be a folder that all images lie below"),
    ],
)
def test_list_of_images_is_checked_before_the_first_is_segmented(
    segment, tmp_path, monkeypatch, images, options, message
):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "ct.nii.gz")
    write_image(tmp_path / "ct.nii")
    with fails_with(message):
        segment(images, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["~/{}", "{}", "../home/{}", "./deep/../{}", "absolute"])
def test_result_lies_in_the_output_folder_however_the_image_is_written(segment, tmp_path, monkeypatch, form):
    home = tmp_path / "home"
    write_image(home / "x.nii.gz")
    write_image(home / "scans/y.nii.gz")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    form = str(home / "{}") if form == "absolute" else form
    segment([form.format("x.nii.gz")])
    assert results(tmp_path / "out") == ["x_seg.nii.gz"]
    segment([form.format("x.nii.gz"), form.format("scans/y.nii.gz")])
    assert results(tmp_path / "out") == ["scans/y_seg.nii.gz", "x_seg.nii.gz"]
    assert results(home) == ["scans/y.nii.gz", "x.nii.gz"]


def test_images_segmented_one_by_one_keep_their_folders_below_images_root(segment, tmp_path):
    for patient in ("a", "b"):
        segment([write_image(tmp_path / f"scans/{patient}/ct.nii.gz")], images_root=str(tmp_path / "scans"))
    assert results(tmp_path / "out") == ["a/ct_seg.nii.gz", "b/ct_seg.nii.gz"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_named_and_leaves_no_part_of_a_segmentation(segment, tmp_path):
    image, result = write_image(tmp_path / "ct.nii.gz"), tmp_path / "out/ct_seg.nii.gz"
    segment([image])
    before = result.read_bytes()
    part_of(result).symlink_to("/dev/full")
    remedy = "make room there, or choose another output_dir"
    with fails_with(f"No space left on device; nothing was written, {remedy}: '{result}'"):
        segment([image])
    assert results(tmp_path / "out") == ["ct_seg.nii.gz"]
    assert result.read_bytes() == before
