"""Cases of a report: read once, cut to what is looked at."""

import json
from unittest import mock

import numpy as np
import pytest
from custom.evaluation.traits import case_traits
from custom.synthesis.page import volumes as page_volumes
from custom.synthesis.page.looking import look
from custom.synthesis.page.volumes import SetVolumes
from custom.volumes.pictures import heart_centre, read_ras, vessel_depth, vessel_projection
from report_sets import NAMES, make_set
from scipy import ndimage

LABELS = {"label_names": NAMES, "vessel_labels": [3]}


@pytest.fixture
def cases(tmp_path):
    """A set on disk, and its records."""
    make_set(tmp_path, cases=4, rejected=1)
    return tmp_path, [json.loads(path.read_text()) for path in sorted((tmp_path / "records").iterdir())]


def test_every_file_is_read_once_whatever_is_asked_of_its_case(cases):
    root, records = cases
    with mock.patch.object(page_volumes, "read_one", wraps=page_volumes.read_one) as read:
        seen = look(
            SetVolumes(root, records, {}), compared=records[1:], pictured=records[:3], viewed=records[:2], **LABELS
        )
    assert len(read.call_args_list) == len({str(call.args[0]) for call in read.call_args_list}) == 4 * 3 + 1
    assert sorted(seen.traits) == ["case_1", "case_2", "case_3"]
    assert sorted(seen.pictures) == ["case_0", "case_1", "case_2"]
    assert sorted(seen.viewed) == ["case_0", "case_1"]
    assert list(seen.templates) == ["image"]
    assert [seen.viewed[f"case_{k}"][0]["note"] for k in (0, 1)] == ["kept apart", "score 4.0 HU"]


def test_traits_of_what_is_cut_are_those_of_the_whole_volume(cases, monkeypatch):
    monkeypatch.setattr(page_volumes, "MARGIN_MM", 3.0)
    root, records = cases
    case = SetVolumes(root, records, {}).synthetic(records[1])
    whole = [read_ras(root / records[1]["paths"][key]) for key in ("image", "label")]
    assert case.image.size < whole[0].size
    assert case.image.flags.c_contiguous
    options = {"label_names": NAMES, "thin_labels": [3]}
    expected = case_traits(*whole, [1.0] * 3, **options)
    found = case_traits(case.image, case.label, case.spacing_mm, **options)
    for inner in ("mean_hu", "volume_ml"):
        assert found.pop(inner) == pytest.approx(expected.pop(inner))
    assert found == pytest.approx(expected)
    assert found["noise_hu"] > 10


def test_the_centre_of_the_heart_is_its_centre_of_mass():
    label = np.random.default_rng(0).integers(0, 3, (9, 12, 7)) * (np.indices((9, 12, 7)).sum(0) > 14)
    assert heart_centre(label) == tuple(round(c) for c in ndimage.center_of_mass(label > 0))
    assert heart_centre(np.zeros((4, 5, 6))) == (2, 2, 3)


def test_vessels_from_the_front_are_those_of_the_whole_volume():
    rng = np.random.default_rng(1)
    label = np.where(rng.random((20, 22, 18)) < 0.01, 3, rng.integers(0, 2, (20, 22, 18)))
    image = rng.normal(0, 300, label.shape).astype(np.float32)
    near = ndimage.binary_dilation(label == 3, iterations=3) & np.isin(label, [0, 3])
    expected = np.where(near, image, -250.0).max(1)
    np.testing.assert_array_equal(vessel_projection(image, label, [3]), np.flip(np.rot90(expected), 1))
    assert (vessel_projection(image, np.zeros_like(label), [3]) == -250).all()


def test_of_vessels_behind_each_other_the_nearest_is_seen():
    label = np.where(np.random.default_rng(2).random((8, 9, 7)) < 0.1, 3, 0)
    depth = np.linspace(0.35, 1.0, 9)[None, :, None]
    front = np.flip(np.rot90(((label == 3) * depth).max(1)), 1)
    silhouette = np.flip(np.rot90((label > 0).mean(1)), 1)
    red = 0.5 * silhouette / silhouette.max() * 0.6 + front
    np.testing.assert_allclose(vessel_depth(label, [3])[..., 0], red.clip(0, 1))
