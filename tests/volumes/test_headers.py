"""Headers that programs read differently are refused, naming file, places and remedy; what we write reads alike."""

import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.volumes.headers import check_ending, corners_apart_mm
from custom.volumes.reading import LoadVolumesd
from custom.volumes.writing import write_volume
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst

AFFINE = np.array([[-1.9, 0.3, 0.0, 40], [0.3, 1.9, 0.0, -30], [0.0, 0.0, 2.5, 9], [0, 0, 0, 1]])
SHEARED = AFFINE @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SHAPE = (9, 8, 7)


def written(path, *, shape=SHAPE, qform=AFFINE, sform=AFFINE, pixdim=None):
    image = nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), None)
    image.set_qform(qform, code=0 if qform is None else 1)
    image.set_sform(sform, code=0 if sform is None else 2)
    if qform is None:  # else its scale is pixdim
        image.header["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    nib.save(image, path)
    if pixdim is not None:
        content = bytearray(path.read_bytes())
        content[80:92] = struct.pack("<3f", *pixdim)
        path.write_bytes(content)
    return str(path)


def read(file):
    return LoadVolumesd("image")({"image": file})["image"]


@pytest.mark.parametrize("forms", [{}, {"sform": None}, {"qform": None}], ids=["both", "qform", "sform"])
def test_the_form_that_a_file_has_is_used(tmp_path, forms):
    np.testing.assert_allclose(read(written(tmp_path / "a.nii", **forms)).affine, AFFINE, atol=1e-5)


def test_a_file_without_a_place_is_refused_with_a_remedy_that_works(tmp_path):
    """Readers differ even in which side is left."""
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), None)
    nib.save(image, tmp_path / "none.nii")
    with pytest.raises(ValueError, match=r"none\.nii: the header must say where .* axes point to L, A, S"):
        read(str(tmp_path / "none.nii"))
    image = nib.load(tmp_path / "none.nii")
    image.set_sform(image.affine, 1)
    nib.save(image, tmp_path / "mended.nii")
    assert nib.aff2axcodes(read(str(tmp_path / "mended.nii")).affine.numpy()) == ("L", "A", "S")


def test_forms_that_agree_to_a_tenth_of_a_voxel_are_one(tmp_path):
    near, far = AFFINE.copy(), AFFINE.copy()
    near[0, 3] += 0.18
    far[0, 3] += 0.25
    np.testing.assert_allclose(read(written(tmp_path / "near.nii", sform=near)).affine, near, atol=1e-5)
    with pytest.raises(ValueError, match=r"far\.nii: qform and sform must agree .* a corner 0\.25 mm apart"):
        read(written(tmp_path / "far.nii", sform=far))


def test_forms_that_disagree_are_refused_with_both_places_and_a_remedy_that_works(tmp_path):
    moved = AFFINE.copy()
    moved[:3, 3] += [12, -8, 5]
    file = written(tmp_path / "two.nii", sform=moved)
    with pytest.raises(ValueError, match=r"two\.nii: qform and sform must agree") as caught:
        read(file)
    for text in (
        "15.3 mm apart",
        "[40.0, -30.0, 9.0] mm by the qform of code 1",
        "[52.0, -38.0, 14.0] mm by the sform",
    ):
        assert text in str(caught.value)
    for remedy, kept in (("image.set_sform(None, 0)", AFFINE), ("image.set_qform(None, 0)", moved)):
        assert remedy in str(caught.value)
        image = nib.load(file)
        eval(remedy, {"image": image})
        nib.save(image, tmp_path / "mended.nii")
        np.testing.assert_allclose(read(str(tmp_path / "mended.nii")).affine, kept, atol=1e-5)


def test_an_sform_of_other_voxel_sizes_is_refused_with_remedies_that_work(tmp_path):
    file = written(tmp_path / "two.nii", qform=np.diag([1.0, 1, 1, 1]))
    with pytest.raises(
        ValueError, match=r"two\.nii: voxel sizes in the header must agree .* \[1\.0, 1\.0, 1\.0\] mm by"
    ):
        read(file)
    image = nib.load(file)
    image.header["pixdim"][1:4] = [1.9235, 1.9235, 2.5]
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "sform.nii")
    np.testing.assert_allclose(read(str(tmp_path / "sform.nii")).affine, AFFINE, atol=1e-5)
    image = nib.load(file)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "qform.nii")
    np.testing.assert_allclose(read(str(tmp_path / "qform.nii")).affine, np.eye(4), atol=1e-5)


def test_a_header_without_a_place_is_refused_with_a_remedy_that_works(tmp_path):
    """ITK and nibabel put it at different places, front and back exchanged."""
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), None), tmp_path / "none.nii")
    with pytest.raises(ValueError, match=r"none\.nii: the header must say where the volume lies, got .* code 0") as no:
        read(str(tmp_path / "none.nii"))
    assert "know that its axes point to L, A, S, in Python" in str(no.value)
    image = nib.load(tmp_path / "none.nii")
    place, remedy = image.affine, "image.set_sform(image.affine, 1)"
    assert remedy in str(no.value)
    eval(remedy, {"image": image})
    nib.save(image, tmp_path / "mended.nii")
    np.testing.assert_allclose(read(str(tmp_path / "mended.nii")).affine, place, atol=1e-5)


BAD = {
    "NaN in the sform": ({"sform": np.where(AFFINE == 9, np.nan, AFFINE)}, "sform must be finite and not flat"),
    "no sform": ({"sform": np.diag([0.0, 0, 0, 1])}, "sform must be finite and not flat"),
    "flat sform": ({"sform": AFFINE[:, [0, 0, 2, 3]]}, "sform must be finite and not flat"),
    "sform of other voxels": ({"qform": None, "sform": AFFINE, "pixdim": (1, 1, 1)}, "voxel sizes in the header must"),
    "zero pixdim": ({"sform": None, "pixdim": (0, 2, 2)}, "voxel sizes (pixdim) must be lengths in mm above 0"),
    "NaN pixdim": ({"pixdim": (2, np.nan, 2)}, "voxel sizes (pixdim) must be lengths in mm above 0"),
    "negative pixdim": ({"pixdim": (2, -2, 2)}, "voxel sizes (pixdim) must be lengths in mm above 0"),
}


@pytest.mark.parametrize(("forms", "rule"), BAD.values(), ids=BAD)
def test_headers_that_are_no_place_are_refused_by_file(tmp_path, forms, rule):
    file = written(tmp_path / "bad.nii", **forms)
    with pytest.raises(ValueError, match=r"bad\.nii: ") as caught:
        read(file)
    assert rule in str(caught.value)


def test_a_qform_that_is_no_rotation_is_refused_by_file(tmp_path):
    file = tmp_path / "bad.nii"
    written(file)
    content = bytearray(file.read_bytes())
    content[256:268] = struct.pack("<3f", 3, 3, 3)  # the quaternion
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.nii: "):
        read(str(file))


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_trailing_axes_of_one_are_no_axes(tmp_path, extra):
    volume = read(written(tmp_path / "a.nii", shape=(*SHAPE, *extra)))
    assert volume.shape == SHAPE
    assert EnsureChannelFirst()(volume).shape == (1, *SHAPE)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


def test_two_phases_keep_their_axis_to_be_refused_by_name(tmp_path):
    assert read(written(tmp_path / "a.nii", shape=(*SHAPE, 2))).shape == (*SHAPE, 2)


@pytest.mark.parametrize("file", ["a.mha", "b.nrrd", "c.nii.gz.zip", "d", "e.img"])
def test_other_formats_are_refused_with_how_to_convert_them(tmp_path, file):
    with pytest.raises(ValueError, match="only NIfTI files are read, which end in .nii or .nii.gz.*SimpleITK"):
        LoadVolumesd("image")({"image": str(tmp_path / file)})


@pytest.mark.parametrize("file", ["a.nii", "b.nii.gz", "C.NII.GZ"])
def test_nifti_endings_pass(file):
    check_ending(file)


@pytest.mark.parametrize(("affine", "qform_code"), [(AFFINE, 1), (SHEARED, 0)], ids=["rotated", "sheared"])
def test_what_is_written_lies_at_one_place_for_readers_of_either_form(tmp_path, affine, qform_code):
    write_volume(tmp_path / "a.nii.gz", MetaTensor(torch.zeros(1, *SHAPE), affine=torch.tensor(affine)), dtype="int16")
    header = nib.load(tmp_path / "a.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, qform_code)
    np.testing.assert_allclose(header.get_sform(), affine, atol=1e-5)
    if qform_code:
        assert corners_apart_mm(SHAPE, header.get_qform(), affine) < 1e-3
    np.testing.assert_allclose(read(str(tmp_path / "a.nii.gz")).affine, affine, atol=1e-5)
