"""The documented way from DICOM to NIfTI: HU, place and axes of what it writes, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom.phantom.cohort import make
from custom.volumes.headers import placed_image
from custom.volumes.reading import reading_chain
from dicom_series import Series, Volume
from dicom_series import write_series as write
from helpers import ROOT
from monai.transforms import Compose
from scipy import ndimage

GUIDE = (ROOT / "docs/FIVE_CASES.md").read_text()
STRAIGHT, TILTED = re.findall(r"^\.venv-dicom/bin/(dicom2nifti .*)$", GUIDE, re.M)
PYTHON = os.environ.get("DICOM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="DICOM_PYTHON names a Python with dicom2nifti, see CONTRIBUTING")
SCAN = {"size": (80, 64), "pixel_mm": 1.5, "slice_mm": 1.8, "intercept": -1000.0, "slopes": (0.5,)}
KEPT_HU = 0.5  # half of the slope, and places that DICOM rounds


@pytest.fixture(scope="module")
def phantom(cohort) -> Volume:
    return Volume.load(cohort / "images/subject_003.nii.gz")


def write_series(*given, **changed) -> None:
    write(*given, python=PYTHON, **changed)


def convert(command: str, folder: Path) -> tuple[list[Path], str]:
    """Run a line of the guide where `dicom/1` is; files written, and what was said."""
    program, *given = command.split()
    (folder / "nifti/1").mkdir(parents=True)
    env = {**os.environ, "PYTHONPATH": ""}
    command = [str(Path(PYTHON).absolute().with_name(program)), *given]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return sorted((folder / "nifti/1").glob("*")), done.stdout + done.stderr


def converted(command: str, folder: Path, phantom: Volume, **changed) -> tuple[nib.Nifti1Image, Series]:
    """The one volume that a line of the guide makes of a series."""
    series = Series(**{**SCAN, **changed})
    write_series(phantom, series, folder / "dicom/1")
    (file,), _ = convert(command, folder)
    return nib.load(file), series


def difference_hu(image: nib.Nifti1Image, phantom: Volume) -> np.ndarray:
    hu = np.asarray(image.dataobj, np.float32)
    return np.abs(hu - phantom.on(hu.shape, image.affine))


@pytest.mark.parametrize(
    "changed",
    [
        {"slopes": (0.5, 0.25), "turn_degrees": 12.0},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"feet_first": True}, marks=pytest.mark.slow),
        pytest.param({"compressed": True}, marks=pytest.mark.slow),
    ],
    ids=["oblique_with_slopes", "plain", "feet_first", "compressed"],
)
def test_a_series_becomes_hu_at_its_place(changed, phantom, tmp_path):
    image, series = converted(STRAIGHT, tmp_path, phantom, **changed)
    assert np.nanmax(difference_hu(image, phantom)) <= KEPT_HU
    written = series.affine(phantom.centre)
    turned = nib.orientations.io_orientation(written), nib.orientations.io_orientation(image.affine)
    flips = nib.orientations.ornt_transform(*turned)
    back = nib.orientations.inv_ornt_aff(flips, (series.size[0], *series.size))
    np.testing.assert_allclose(image.affine, written @ back, atol=1e-3)
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    assert b"Phantom" not in image.header.binaryblock, "the patient's name"


def with_label(image: nib.Nifti1Image, label_file: Path, folder: Path) -> None:
    """The case of the guide: this image, and the phantom's label map on its grid."""
    label = nib.load(label_file)
    step = np.linalg.inv(label.affine) @ image.affine
    ids = ndimage.affine_transform(np.asarray(label.dataobj), step, output_shape=image.shape, order=0)
    (folder / "cases/images").mkdir(parents=True)
    (folder / "cases/labels").mkdir()
    nib.save(image, folder / "cases/images/1.nii.gz")
    nib.save(placed_image(ids.astype(np.uint8), image.affine), folder / "cases/labels/1.nii.gz")


@pytest.mark.slow
@pytest.mark.parametrize("tilt_degrees", [0.0, 15.0], ids=["straight", "tilted"])
def test_what_is_written_passes_the_check(tilt_degrees, tmp_path):
    make(str(tmp_path / "made"), subjects=1, shape=(96, 96, 96), spacing_mm=1.5, seed=3)
    sharp = Volume.load(tmp_path / "made/images/subject_000.nii.gz", sigma_voxels=0)  # smooth coronaries are dark
    command = TILTED if tilt_degrees else STRAIGHT
    image, _ = converted(command, tmp_path, sharp, tilt_degrees=tilt_degrees, size=(96, 96), slice_mm=1.5)
    with_label(image, tmp_path / "made/labels/subject_000.nii.gz", tmp_path)
    check = [sys.executable, "-m", "custom.study", "check", "cases"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(check, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "10 of 10" in done.stderr
    assert "0 of 1 cases will be refused" in done.stderr


def test_gantry_tilt_is_refused_until_it_is_asked_for(phantom, tmp_path):
    write_series(phantom, Series(**SCAN, tilt_degrees=15.0), tmp_path / "dicom/1")
    files, said = convert(STRAIGHT, tmp_path)
    assert files == []
    assert "GANTRY_TILT" in said


def test_gantry_tilt_is_resampled_onto_a_straight_grid_at_the_same_place(phantom, tmp_path):
    image, _ = converted(TILTED, tmp_path, phantom, tilt_degrees=15.0)
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-4)
    scanned = np.asarray(image.dataobj) > -1000  # what was not is filled
    difference = difference_hu(image, phantom)[ndimage.binary_erosion(scanned)]
    assert np.median(difference) < 2
    assert np.percentile(difference, 95) < 20
    assert np.asarray(image.dataobj).min() == -1024


def test_a_sheared_grid_keeps_its_voxels_and_is_read_onto_a_straight_one_at_its_place(phantom, cohort, tmp_path):
    image, _ = converted(STRAIGHT.replace("dicom2nifti", "dicom2nifti -G"), tmp_path, phantom, tilt_degrees=15.0)
    assert np.nanmax(difference_hu(image, phantom)) <= KEPT_HU
    with_label(image, cohort / "labels/subject_003.nii.gz", tmp_path)
    unchanged = {"from": [], "to": []}
    pairs = [["image", "label"]]
    chain = reading_chain(pairs=pairs, num_labels=11, label_mapping=unchanged, spacing_mm=[1.5, 1.5, 1.5])
    read = Compose(chain)({key: str(tmp_path / f"cases/{key}s/1.nii.gz") for key in ("image", "label")})
    affine = read["image"].affine.numpy()
    axes = affine[:3, :3] / 1.5
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-4)
    hu, true = read["image"][0].numpy(), phantom.on(read["image"].shape[1:], affine)
    heart = read["label"][0].numpy() > 0
    assert np.nanmedian(np.abs(hu - true)[heart]) < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [({"missing": (17,)}, "SLICE_INCREMENT_INCONSISTENT"), ({"shifted": {30: 1.0}}, "SLICE_INCREMENT_INCONSISTENT")],
    ids=["missing", "uneven"],
)
def test_slices_that_are_no_grid_are_refused_with_the_word_of_the_guide(changed, said, phantom, tmp_path):
    write_series(phantom, Series(**SCAN, **changed), tmp_path / "dicom/1")
    files, printed = convert(STRAIGHT, tmp_path)
    assert files == []
    assert said in printed
    assert said in GUIDE


@pytest.mark.slow
@pytest.mark.parametrize(("one_series", "written"), [(False, 2), (True, 0)])
def test_two_phases_are_two_files_or_refused_never_mixed(one_series, written, phantom, tmp_path):
    uids = ["1.2.3", "1.2.3" if one_series else "1.2.4"]
    for uid, add_hu in zip(uids, (0, 50), strict=True):
        series = Series(**SCAN, description=f"phase {add_hu}")
        write_series(phantom, series, tmp_path / "dicom/1", uid=uid, add_hu=add_hu)
    files, said = convert(STRAIGHT, tmp_path)
    assert len(files) == written
    found = sorted(np.nanmedian(difference_hu(nib.load(file), phantom)) for file in files)
    np.testing.assert_allclose(found, [0, 50][:written], atol=1)
    assert one_series == ("NOT_A_VOLUME" in said)
    assert "NOT_A_VOLUME" in GUIDE
