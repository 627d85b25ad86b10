"""Rendered volumes are written whole or not at all."""

import errno
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.runs.files import part_of
from custom.volumes.writing import CheckFinited, SaveVolumed
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, Orientation

OBLIQUE = np.array([[1.2, -0.3, 0.0, 7.0], [0.2, 1.1, 0.1, -80.0], [0.0, -0.2, -2.5, 33.0], [0, 0, 0, 1]])


def rendering(shape=(5, 7, 3), affine=OBLIQUE):
    values = torch.linspace(-1024, 3071, int(np.prod(shape))).reshape(1, *shape)
    return MetaTensor(values, affine=torch.as_tensor(affine), meta={"spatial_shape": np.array(shape)})


def save(folder, case="case", **options):
    item = {"pred": rendering(**options), "case": case}
    return SaveVolumed("pred", output_dir=str(folder))(item)


@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 6, 1), (1, 6, 4)])
def test_volume_is_written_rounded_as_int16_on_its_own_grid(tmp_path, shape):
    save(tmp_path, shape=shape)
    written = nib.load(tmp_path / "case.nii.gz")
    assert written.shape == shape
    assert written.get_data_dtype() == np.int16
    np.testing.assert_allclose(written.affine, OBLIQUE, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(written.dataobj), rendering(shape)[0].round().numpy())


def test_written_is_the_affine_the_volume_has_now_not_the_one_it_was_read_with(tmp_path):
    volume = rendering()
    volume.meta["original_affine"] = np.eye(4)
    SaveVolumed("pred", output_dir=str(tmp_path))({"pred": volume, "case": "case"})
    np.testing.assert_allclose(nib.load(tmp_path / "case.nii.gz").affine, OBLIQUE, atol=1e-5)


def test_item_passes_unchanged_and_the_folder_is_made(tmp_path):
    result = save(tmp_path / "new/deep")
    assert torch.equal(result["pred"], rendering())
    assert [path.name for path in (tmp_path / "new/deep").iterdir()] == ["case.nii.gz"]


@pytest.mark.parametrize(("dtype", "digits", "expected"), [("uint8", 0, 3), ("float32", 2, 2.57), ("int16", 0, 3)])
def test_dtype_and_digits_are_those_asked_for(tmp_path, dtype, digits, expected):
    volume = MetaTensor(torch.full((1, 3, 4, 5), 2.5678), affine=torch.eye(4))
    SaveVolumed("pred", output_dir=str(tmp_path), dtype=dtype, digits=digits)({"pred": volume, "case": "a"})
    written = nib.load(tmp_path / "a.nii.gz")
    assert written.get_data_dtype() == dtype
    np.testing.assert_allclose(np.asarray(written.dataobj), expected, rtol=1e-6)


def test_label_maps_of_bytes_are_written_as_they_are(tmp_path):
    label = torch.randint(0, 11, (1, 3, 4, 5)).to(torch.uint8)
    item = {"pred": MetaTensor(label, affine=torch.eye(4)), "case": "a"}
    SaveVolumed("pred", output_dir=str(tmp_path), dtype="uint8")(item)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj), label[0].numpy())


def test_axes_are_turned_back_to_those_of_the_file(tmp_path):
    values = np.random.default_rng(0).normal(0, 50, (5, 4, 3)).astype(np.float32)
    affine = np.array([[0, 0, -2.0, 9], [-1.5, 0, 0, 8], [0, 1.0, 0, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "in.nii.gz")
    volume = Orientation(axcodes="RAS", labels=None)(EnsureChannelFirst()(LoadImage()(tmp_path / "in.nii.gz")))
    assert volume.shape[1:] == (3, 5, 4)
    item = {"pred": volume, "case": "a"}
    SaveVolumed("pred", output_dir=str(tmp_path / "out"), dtype="float32", digits=3, original_axes=True)(item)
    written = nib.load(tmp_path / "out/a.nii.gz")
    np.testing.assert_allclose(np.asarray(written.dataobj), values, atol=6e-4)
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)


def test_dots_in_a_case_name_are_kept(tmp_path):
    save(tmp_path, case="patient.v1_from_b.c")
    assert (tmp_path / "patient.v1_from_b.c.nii.gz").is_file()


def test_older_result_is_replaced(tmp_path):
    (tmp_path / "case.nii.gz").write_bytes(b"old")
    save(tmp_path)
    assert nib.load(tmp_path / "case.nii.gz").shape == (5, 7, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("shape", [(5, 7, 3), (90, 80, 70)], ids=["fails when closed", "fails while writing"])
def test_full_disk_is_named_and_leaves_nothing(tmp_path, shape):
    part_of(tmp_path / "case.nii.gz").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; nothing was written, make room") as caught:
        save(tmp_path, shape=shape)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "case.nii.gz") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_half_way_keeps_the_older_result_and_no_part_of_the_new(tmp_path, monkeypatch):
    (tmp_path / "case.nii.gz").write_bytes(b"old")

    def half(image, filename):
        Path(filename).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", half)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["case.nii.gz"]
    assert (tmp_path / "case.nii.gz").read_bytes() == b"old"


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(image, filename):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory.*file/out"):
        save(tmp_path / "file/out")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
def test_volume_that_is_not_finite_is_refused_by_name_and_leaves_nothing(tmp_path, bad, dtype):
    volume = rendering()
    volume[0, 1, 2, 1] = bad
    item = {"pred": volume, "case": "case"}
    with pytest.raises(ValueError, match=r"case\.nii\.gz: the result is NaN or infinite in 1 of 105 values.*weights"):
        SaveVolumed("pred", output_dir=str(tmp_path / "out"), dtype=dtype)(item)
    assert not (tmp_path / "out").exists()


def test_prediction_that_is_not_finite_is_refused_by_the_name_of_its_image():
    image = rendering()
    image.meta["filename_or_obj"] = "/data/ct.nii.gz"
    item = {"image": image, "pred": torch.zeros(3, 5, 7, 3)}
    assert CheckFinited("pred")(item).keys() == item.keys()
    item["pred"][2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"/data/ct\.nii\.gz: the result is NaN or infinite in 1 of 315 values"):
        CheckFinited("pred")(item)
