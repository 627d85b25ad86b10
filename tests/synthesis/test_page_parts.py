"""Parts of the report: reasons in words, the library of the viewer, sizes, and what is drawn."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from custom.evaluation.gate import ImageGate, rejections
from custom.synthesis.page.assembling import Picture, fitting, spread
from custom.synthesis.page.niivue import find_niivue
from custom.synthesis.page.reasons import in_words
from custom.synthesis.page.volumes import Case, cropped, resampled
from custom.volumes.colours import label_colour
from scipy import ndimage

NAMES = ["background", "LV myocardium", "left atrium"]


def test_every_limit_of_the_gate_has_a_sentence_of_its_own():
    measures = {
        "label_error_hu": {1: -80.0},
        "label_sd_ratio": {2: 3.0},
        "label_mean_hu": {2: 20.0},
        "vessel_contrast": 0.31,
        "vessel_continuity": 0.25,
        "template_copy": 0.9,
    }
    limits = {"max_score_hu": 50.0, "plausible_hu": {2: (100, 700)}}
    broken = rejections(measures, 60.0, ImageGate(**limits))
    words = [in_words(reason, label_names=NAMES, gate={"max_label_error_hu": 60.0}) for reason in broken]
    assert len(words) == len(ImageGate.__dataclass_fields__)
    assert not set(words) & set(broken)
    assert words[0].startswith("LV myocardium: 80 HU darker on average than in the template (60.0 HU are allowed)")
    assert "varies 3.0 times as much as in the template (at most the limit times)" in words[1]
    assert words[2] == "Left atrium: 20 HU on average, which no scan shows (plausible are 100 to 700 HU)."
    assert "by 31 % of what they do in the template (at least 50 %)" in words[3]
    assert "is 25 % of that in the template (at least 70 %)" in words[4]
    assert "correlates by 0.90 with it (at most 0.8)" in words[5]
    assert words[6] == "Expected to be wrong by 60.0 HU, mean over the labels (at most 50.0 HU)."


@pytest.mark.parametrize("reason", ["max_beauty: 3", "plausible_hu: label 77 has 3 HU, plausible are 5 to 6", "why"])
def test_a_reason_that_is_not_known_stays_as_it_is(reason):
    assert in_words(reason, label_names=NAMES, gate={}) == reason


def test_the_library_is_one_module_with_its_licence():
    found = find_niivue()
    assert found.missing == ""
    assert "Niivue" in found.module[-1000:]
    assert "BSD 2-Clause License" in found.licence
    assert "Copyright" in found.licence
    assert "</script" not in found.module


def test_the_library_is_found_without_importing_its_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipyniivue", raising=False)
    assert find_niivue().module
    assert "ipyniivue" not in sys.modules


def package(tmp_path, widget):
    (tmp_path / "ipyniivue/static").mkdir(parents=True)
    if widget is not None:
        (tmp_path / "ipyniivue/static/widget.js").write_text(widget)
    return SimpleNamespace(version="9.0", files=[], locate_file=lambda name: tmp_path / name)


@pytest.mark.parametrize("widget", [None, "", 'export{A as Niivue};"short"', 'var a="' + 200_000 * "x" + '"'])
def test_a_package_that_is_laid_out_otherwise_is_refused_with_the_version_to_install(tmp_path, widget):
    with mock.patch("custom.synthesis.page.niivue.distribution", return_value=package(tmp_path, widget)):
        found = find_niivue()
    assert found.module == ""
    assert "its version 9.0 is laid out differently; pip install --no-deps ipyniivue==" in found.missing


def test_a_package_that_is_not_installed_is_named():
    with mock.patch("custom.synthesis.page.niivue.distribution", side_effect=PackageNotFoundError):
        assert find_niivue().missing.startswith("the package ipyniivue is not installed; pip install --no-deps")


def test_items_are_spread_from_first_to_last():
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(2), 3) == [0, 1]
    assert spread(range(3), 1) == [0]
    assert spread([], 3) == []


def test_pictures_that_do_not_fit_leave_the_first_and_the_last():
    pictures = [Picture("png", bytes(1000), str(k)) for k in range(5)]
    assert fitting(pictures, 10**6) == pictures
    assert [picture.caption for picture in fitting(pictures, 3 * pictures[0].size)] == ["0", "2", "4"]
    assert fitting(pictures, 10) == []


def tube_case(spacing_mm=(0.5, 0.5, 1.0)):
    """A ball and a vessel two voxels wide that leaves it in a slant."""
    label = np.zeros((60, 60, 40), np.uint8)
    x, y, z = np.indices(label.shape)
    label[(x - 25) ** 2 + (y - 25) ** 2 + (2 * (z - 20)) ** 2 < 150] = 1
    for step in range(22):
        label[30 + step : 32 + step, 30 + step // 2 : 32 + step // 2, 20] = 2
    return Case(label * 100.0, label, np.full(label.shape, 0.5, np.float32), spacing_mm)


def test_a_case_is_cut_to_its_labels_and_a_margin_in_mm():
    case = tube_case()
    cut = cropped(case, 2.0)
    inside = np.argwhere(cut.label > 0)
    assert inside.min(0).tolist() == [4, 4, 2]
    assert (np.array(cut.label.shape) - 1 - inside.max(0)).tolist() == [4, 4, 2]
    assert cut.image.shape == cut.label.shape == cut.confidence.shape
    empty = case._replace(label=np.zeros_like(case.label))
    assert cropped(empty, 2.0).label.shape == case.label.shape


def test_a_coarser_case_has_even_voxels_and_vessels_in_one_piece():
    small = resampled(tube_case(), 1.2, [2])
    assert small.spacing_mm == [1.2] * 3
    assert ndimage.label(small.label == 2, np.ones((3, 3, 3)))[1] == 1
    np.testing.assert_allclose(small.confidence, 0.5, atol=1e-5)
    assert resampled(tube_case(), 0.6, [2]).spacing_mm == [1.0] * 3  # no finer than its coarsest edge


def test_each_label_has_a_colour_of_its_own():
    colours = [label_colour(k) for k in range(1, 31)]
    assert len(set(colours)) == 30
    assert all(len(colour) == 7 and colour.startswith("#") for colour in colours)
    assert label_colour(35) == label_colour(15)
