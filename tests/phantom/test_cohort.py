"""Claims about the cardiac CT phantom: topology, contact, reproducibility, plausible HU, files that restart."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom.geometry.topology import betti_numbers
from custom.phantom.cohort import INTENDED_BETTI, LABELS, Subject, make, make_subject
from monai.data import load_decathlon_datalist
from scipy import ndimage

GRIDS = [((96, 96, 96), 1.5), ((64, 64, 64), 2.25), ((72, 72, 72), 2.0)]
COARSE = {"shape": (64, 64, 64), "spacing_mm": 2.25}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject(7, 0, **COARSE)


def touches(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((ndimage.binary_dilation(a, np.ones((3, 3, 3))) & b).any())


def check_label(label: np.ndarray) -> None:
    """The intended topology, and the contacts that anatomy demands."""
    assert {k: betti_numbers(label == k) for k in INTENDED_BETTI} == INTENDED_BETTI
    for tree in range(1, 3):
        components, _ = ndimage.label(label == LABELS["coronaries"], np.ones((3, 3, 3)))
        assert touches(components == tree, label == LABELS["aorta"])
    veins, count = ndimage.label(label == LABELS["pulmonary_veins"], np.ones((3, 3, 3)))
    assert all(touches(veins == n, label == LABELS["left_atrium"]) for n in range(1, count + 1))
    for a, b in [
        ("left_ventricle", "aorta"),
        ("left_ventricle", "left_atrium"),
        ("right_ventricle", "right_atrium"),
        ("right_ventricle", "pulmonary_artery"),
        ("appendage", "left_atrium"),
        ("myocardium", "left_ventricle"),
    ]:
        assert touches(label == LABELS[a], label == LABELS[b]), f"{a} does not touch {b}"


@pytest.mark.parametrize(("shape", "spacing_mm"), GRIDS)
def test_labels_have_the_intended_topology_and_contacts(shape: tuple[int, int, int], spacing_mm: float) -> None:
    check_label(make_subject(3, 1, shape=shape, spacing_mm=spacing_mm).label)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "spacing_mm"), GRIDS)
@pytest.mark.parametrize("index", range(20))
def test_twenty_subjects_have_the_intended_topology(index: int, shape: tuple[int, int, int], spacing_mm: float) -> None:
    check_label(make_subject(0, index, shape=shape, spacing_mm=spacing_mm).label)


def test_arrays_are_int16_hu_and_uint8_labels_on_a_ras_grid(subject: Subject) -> None:
    assert (subject.image.dtype, subject.clean.dtype, subject.label.dtype) == (np.int16, np.int16, np.uint8)
    assert subject.image.shape == subject.clean.shape == subject.label.shape == COARSE["shape"]
    np.testing.assert_array_equal(subject.affine, np.diag([2.25, 2.25, 2.25, 1.0]))
    assert nib.aff2axcodes(subject.affine) == ("R", "A", "S")
    json.dumps(subject.parameters)


def test_heart_is_placed_as_in_a_body(subject: Subject) -> None:
    centre = {n: np.argwhere(subject.label == k).mean(axis=0) for n, k in LABELS.items()}
    right, anterior, superior = range(3)
    assert centre["right_atrium"][right] > centre["left_atrium"][right] > centre["left_ventricle"][right]
    assert centre["right_ventricle"][anterior] > centre["left_ventricle"][anterior] > centre["left_atrium"][anterior]
    assert centre["pulmonary_artery"][superior] > centre["right_ventricle"][superior]
    assert centre["appendage"][right] < centre["left_atrium"][right]


def test_tissue_means_are_those_of_a_contrast_ct(subject: Subject) -> None:
    inside = {n: ndimage.binary_erosion(subject.label == k) for n, k in LABELS.items()}
    for name in ("left_ventricle", "left_atrium", "aorta"):
        assert 330 < subject.clean[inside[name]].mean() < 570
    assert 70 < subject.clean[inside["myocardium"]].mean() < 145
    assert 100 < subject.clean[inside["right_ventricle"]].mean() < 700
    assert (subject.clean[subject.label == 0] < -700).mean() > 0.2


def test_coronaries_are_brighter_than_what_surrounds_them() -> None:
    s = make_subject(3, 0)
    lumen = s.label == LABELS["coronaries"]
    shell = ndimage.binary_dilation(lumen, iterations=3) & (s.label == 0) & ~ndimage.binary_dilation(lumen)
    assert np.median(s.clean[lumen]) > np.median(s.clean[shell]) + 100


def test_noise_is_all_that_separates_image_and_clean(subject: Subject) -> None:
    difference = subject.image.astype(float) - subject.clean
    assert abs(difference.mean()) < 1.0
    assert difference.std() == pytest.approx(subject.parameters["appearance"]["noise_hu"], rel=0.15)


def test_same_seed_and_index_give_the_same_subject(subject: Subject) -> None:
    again = make_subject(7, 0, **COARSE)
    np.testing.assert_array_equal(again.image, subject.image)
    np.testing.assert_array_equal(again.label, subject.label)
    assert again.parameters == subject.parameters


def test_appearance_seed_keeps_the_anatomy_and_changes_the_image(subject: Subject) -> None:
    other = make_subject(7, 0, appearance_seed=8, **COARSE)
    np.testing.assert_array_equal(other.label, subject.label)
    assert other.parameters["anatomy"] == subject.parameters["anatomy"]
    assert np.abs(other.clean.astype(int) - subject.clean).mean() > 5
    assert not np.array_equal(make_subject(7, 1, **COARSE).label, subject.label)


def test_one_appearance_seed_gives_two_anatomies_one_look_and_different_noise() -> None:
    a, b = (make_subject(7, index, appearance_seed=4, **COARSE) for index in range(2))
    assert a.parameters["appearance"] == b.parameters["appearance"]
    assert not np.array_equal(a.label, b.label)
    noise = [(s.image.astype(float) - s.clean).ravel() for s in (a, b)]
    assert abs(np.corrcoef(noise)[0, 1]) < 0.05


def test_artefacts_change_the_image_but_not_the_label(subject: Subject) -> None:
    other = make_subject(7, 0, artefacts=True, **COARSE)
    np.testing.assert_array_equal(other.label, subject.label)
    assert other.parameters["artefacts"]["plaques"] >= 1
    assert not np.array_equal(other.clean, subject.clean)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shape": (40, 96, 96)}, "shape .* at least 48"),
        ({"spacing_mm": 0.0}, "spacing_mm must be in"),
        ({"spacing_mm": -1.5}, "spacing_mm must be in"),
        ({"shape": (64, 64, 64), "spacing_mm": 1.0}, "120.* mm along every axis to hold a heart"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"appearance_seed": -2}, "appearance_seed must be at least 0"),
    ],
)
def test_bad_arguments_name_the_argument_and_the_remedy(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_subject(**({"seed": 0, "index": 0} | options))


def test_shape_of_the_wrong_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="shape must be three integers"):
        make_subject(0, 0, shape="large")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(str(tmp_path_factory.mktemp("cohort")), subjects=3, seed=7, **COARSE))


def test_monai_reads_the_datalist_and_the_files_carry_the_affine(cohort: Path) -> None:
    for key in ("training", "validation", "test"):
        (item,) = load_decathlon_datalist(cohort, True, key, cohort.parent)
        for name, dtype in (("image", np.int16), ("label", np.uint8)):
            nifti = nib.load(item[name])
            np.testing.assert_array_equal(nifti.affine, np.diag([2.25, 2.25, 2.25, 1.0]))
            assert nifti.get_data_dtype() == dtype
            codes = {form: int(nifti.header[f"{form}_code"]) for form in ("qform", "sform")}
            assert codes == {"qform": 1, "sform": 1}, "programs read one or the other"
            np.testing.assert_array_equal(nifti.get_qform(), nifti.get_sform())
            assert nifti.header.get_xyzt_units()[0] == "mm"
        assert (cohort.parent / item["clean"]).exists()


def test_a_written_subject_is_that_of_the_array_function(cohort: Path, subject: Subject) -> None:
    written = nib.load(cohort.parent / "images" / "subject_000.nii.gz").get_fdata()
    np.testing.assert_array_equal(written, subject.image)
    record = json.loads((cohort.parent / "parameters.json").read_text())
    assert record["subjects"]["subject_000"] == subject.parameters
    assert record["provenance"]["seed"] == 7


def test_restart_makes_only_what_is_missing(cohort: Path) -> None:
    first, second = (cohort.parent / "images" / f"subject_00{i}.nii.gz" for i in range(2))
    before, age = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    make(str(cohort.parent), subjects=3, seed=7, workers=2, **COARSE)
    assert first.stat().st_mtime_ns == age
    np.testing.assert_array_equal(nib.load(second).get_fdata(), make_subject(7, 1, **COARSE).image)
    assert len(second.read_bytes()) == pytest.approx(len(before), abs=64)  # gzip headers hold a time


def test_another_provenance_or_foreign_content_is_refused(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parameters.json was made with"):
        make(str(cohort.parent), subjects=3, seed=8, **COARSE)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt; choose an empty folder"):
        make(str(tmp_path), subjects=1, **COARSE)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"subjects": 0}, "subjects must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"test_fraction": 0.9}, "below 1 together"),
        ({"artefacts": "maybe"}, "artefacts must be true or false"),
    ],
)
def test_bad_cohort_arguments_are_refused_before_anything_is_written(tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(str(tmp_path / "new"), **options)
    assert not os.path.exists(tmp_path / "new")


def test_a_subject_takes_seconds() -> None:
    start = time.process_time()
    make_subject(0, 0)
    assert time.process_time() - start < 15
