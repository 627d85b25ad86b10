"""Claims about phantoms of the clinic style: topology, what is recorded, fields of view, label noise, streaks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom.geometry.topology import betti_numbers
from custom.phantom.annotation import annotate
from custom.phantom.clinic import CORE_MM, FIELDS, draw_field
from custom.phantom.cohort import make
from custom.phantom.contrast import CLINIC_TISSUES, PHASES, draw_look
from custom.phantom.geometry import MODEL_CENTRE
from custom.phantom.labels import INTENDED_BETTI, LABELS
from custom.phantom.layers import Layers, box_of
from custom.phantom.projection import beam_hardening
from custom.phantom.subject import Subject, make_subject
from scipy import ndimage

COARSE = {"shape": (64, 64, 64), "spacing_mm": 2.25, "style": "clinic"}
TRAITS = ("field", "heart_kind", "dominance", "veins", "heart_angles_deg", "body", "abdomen", "trabeculation", "scale")
ARTEFACTS = ("plaques", "stents", "leads", "sternal_wires", "stent_graft_mm", "beam_hardening", "rca_motion_mm")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject(7, 0, **COARSE)


@pytest.fixture(scope="module")
def wide() -> Subject:
    return make_subject(5, 0, shape=(104, 88, 60), spacing_mm=2.5, style="clinic")


def check_topology(subject: Subject) -> None:
    """What was meant is there, and only aorta and veins are meant differently from subject to subject."""
    intended = {int(k): tuple(numbers) for k, numbers in subject.parameters["intended_betti"].items()}
    assert {k: betti_numbers(subject.label == k) for k in intended} == intended
    assert {k: v for k, v in intended.items() if k not in (6, 10)} == {
        k: v for k, v in INTENDED_BETTI.items() if k not in (6, 10)
    }
    assert intended[10] == (subject.parameters["anatomy"]["veins"], 0, 0)
    assert intended[6] in ((1, 0, 0), (2, 0, 0))
    near = ndimage.binary_dilation(subject.label == LABELS["aorta"], np.ones((3, 3, 3)))
    trees, count = ndimage.label(subject.label == LABELS["coronaries"], np.ones((3, 3, 3)))
    assert all((near & (trees == n)).any() for n in range(1, count + 1))


def test_labels_have_the_topology_that_the_record_intends(subject: Subject) -> None:
    check_topology(subject)


def test_a_cut_arch_leaves_two_pieces_of_aorta(wide: Subject) -> None:
    assert wide.parameters["anatomy"]["field"] == "chest"
    assert wide.parameters["intended_betti"]["6"] == [2, 0, 0]
    check_topology(wide)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "spacing_mm"), [((96, 96, 96), 1.5), ((80, 76, 84), 2.25)])
@pytest.mark.parametrize("index", range(12))
def test_twelve_subjects_have_the_intended_topology(index: int, shape: tuple[int, int, int], spacing_mm: float) -> None:
    check_topology(make_subject(0, index, shape=shape, spacing_mm=spacing_mm, style="clinic"))


def test_everything_drawn_is_recorded(subject: Subject) -> None:
    record = json.loads(json.dumps(subject.parameters))
    assert set(TRAITS) <= set(record["anatomy"])
    assert set(ARTEFACTS) <= set(record["artefacts"])
    assert record["appearance"]["phase"] in PHASES
    assert record["anatomy"]["field"] in FIELDS
    assert record["anatomy"]["voxels"] == list(subject.label.shape)
    assert set(CLINIC_TISSUES) <= set(record["appearance"]["hu"])


def test_appearance_seed_keeps_the_anatomy_and_changes_the_image(subject: Subject) -> None:
    other = make_subject(7, 0, appearance_seed=8, **COARSE)
    np.testing.assert_array_equal(other.label, subject.label)
    assert other.parameters["anatomy"] == subject.parameters["anatomy"]
    assert np.abs(other.clean.astype(int) - subject.clean).mean() > 5


@pytest.mark.parametrize(("shape", "spacing_mm"), [((96, 96, 96), 1.5), ((160, 150, 160), 1.5), ((240, 240, 120), 1.0)])
def test_fields_of_view_hold_the_heart_and_vary(shape: tuple[int, int, int], spacing_mm: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        grid, scale, origin, _ = draw_field(shape, spacing_mm, rng)
        corners = scale * (CORE_MM - MODEL_CENTRE) / spacing_mm + np.array(origin)
        assert all(n <= m for n, m in zip(grid, shape, strict=True))
        assert corners[0].min() > -1
        assert (corners[1] < np.array(grid)).all()
    if min(shape) * spacing_mm > 200:
        sizes = {draw_field(shape, spacing_mm, rng)[0] for _ in range(20)}
        assert len(sizes) > 10
        assert max(n[2] for n in sizes) > 1.3 * min(n[2] for n in sizes)


def test_contrast_of_left_and_right_heart_and_lung_arteries_varies_by_itself() -> None:
    looks = [draw_look(np.random.default_rng(seed))["hu"] for seed in range(200)]
    hu = {name: np.array([look[name] for look in looks]) for name in looks[0]}
    assert abs(np.corrcoef(hu["left_ventricle"], hu["pulmonary_artery"])[0, 1]) < 0.5
    assert (hu["pulmonary_artery"] > 1.2 * hu["aorta"]).mean() > 0.2
    assert (hu["pulmonary_artery"] < 0.8 * hu["aorta"]).mean() > 0.2
    assert min(hu[name].min() for name in ("left_ventricle", "left_atrium", "aorta")) >= 130
    assert min(hu[name].min() for name in ("right_ventricle", "right_atrium", "pulmonary_artery")) >= 75


def test_a_wide_field_shows_air_around_a_body_with_lungs_fat_muscle_and_bone(wide: Subject) -> None:
    clean, background = wide.clean, wide.label == 0
    shares = {
        name: float(((clean > low) & (clean < high) & background).mean())
        for name, (low, high) in {
            "lung": (-950, -650),
            "fat": (-140, -50),
            "soft": (0, 120),
            "bone": (250, 3071),
        }.items()
    }
    assert min(shares["lung"], shares["soft"]) > 0.08, shares
    assert min(shares["fat"], shares["bone"]) > 0.015, shares
    assert (clean < -960).mean() > 0.05


def test_label_noise_moves_boundaries_by_about_half_a_voxel_and_shortens_vessels(subject: Subject) -> None:
    noisy, drawn = annotate(subject.label, 2.25, np.random.default_rng(0))
    atrium = subject.label == LABELS["left_atrium"], noisy == LABELS["left_atrium"]
    edge = ndimage.distance_transform_edt(atrium[0]) + ndimage.distance_transform_edt(~atrium[0])
    assert 0 < edge[atrium[0] ^ atrium[1]].mean() < 2
    assert 0.85 < 2 * (atrium[0] & atrium[1]).sum() / (atrium[0].sum() + atrium[1].sum()) < 0.995
    vessel = [(a == LABELS["coronaries"]).sum() for a in (subject.label, noisy)]
    assert vessel[1] < vessel[0]
    assert 0.55 <= drawn["coronaries_kept"] <= 1


def test_label_noise_of_a_map_without_vessels_leaves_them_absent() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:15, 5:15, 5:15] = 3
    assert set(np.unique(annotate(label, 1.5, np.random.default_rng(1))[0])) == {0, 3}


def test_with_label_noise_the_exact_label_lies_beside(subject: Subject, tmp_path: Path) -> None:
    datalist = Path(make(str(tmp_path / "noisy"), subjects=1, seed=7, label_noise=True, **COARSE))
    (item,) = json.loads(datalist.read_text())["training"]
    noisy, exact = (np.asarray(nib.load(tmp_path / "noisy" / item[key]).dataobj) for key in ("label", "exact"))
    np.testing.assert_array_equal(exact, subject.label)
    image = nib.load(tmp_path / "noisy" / item["image"]).get_fdata()
    np.testing.assert_array_equal(image, subject.image, "a subject depends on seed and number alone")
    assert (noisy != exact).any()
    provenance = json.loads(datalist.read_text())["provenance"]
    assert provenance["style"] == "clinic"
    assert provenance["label_noise"] is True
    with pytest.raises(ValueError, match="parameters.json was made with"):
        make(str(tmp_path / "noisy"), subjects=1, seed=7, **COARSE)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"style": "hospital"}, "style must be one of plain, clinic, got 'hospital'"),
        ({"style": "clinic", "artefacts": True}, "leave --artefacts out"),
        ({"label_noise": "maybe"}, "label_noise must be true or false"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(str(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()


def disc(shape: Sequence[int], centre: Sequence[float], radius: float) -> np.ndarray:
    x, y = np.ogrid[: shape[0], : shape[1]]
    return np.hypot(x - centre[0], y - centre[1]) < radius


def test_beam_hardening_spares_water_and_darkens_what_lies_between_dense_things() -> None:
    hu = np.full((90, 80, 2), -1000.0, np.float32)
    hu[disc(hu.shape, (44.5, 39.5), 36)] = 0
    assert np.abs(beam_hardening(hu, 2.0, 1.0)).max() < 0.1
    for x in (28, 61):
        hu[disc(hu.shape, (x, 39.5), 5), 0] = 1200
    error = beam_hardening(hu, 2.0, 1.0)
    assert error[42:48, 37:43, 0].mean() < -5 < error[42:48, 14:20, 0].mean()
    assert np.abs(error[..., 1]).max() < 0.1, "slices are apart"
    np.testing.assert_allclose(beam_hardening(hu, 2.0, 0.5), 0.5 * error, atol=1e-3)


def test_layers_cover_one_another_and_keep_only_the_box_they_are_in() -> None:
    distance = np.full((8, 8, 8), 5.0, np.float32)
    distance[2:4, 3:5, 4:6] = -5.0
    layers = Layers(1.0)
    layers.add("fat", distance)
    layers.add("absent", np.full((8, 8, 8), 5.0, np.float32))
    ((part,),) = layers.stack
    assert part.box == (slice(2, 4), slice(3, 5), slice(4, 6))
    assert part.share.min() == 1
    np.testing.assert_array_equal(layers.share_of("fat", (8, 8, 8)), distance < 0)
    assert box_of(np.zeros((3, 3, 3), bool)) is None
