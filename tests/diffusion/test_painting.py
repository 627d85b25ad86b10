"""What is drawn of a painted volume: classes of tissue that stay themselves, and means that a scan could have."""

import numpy as np
import pytest
from custom.diffusion.painting import (
    draw_label_means,
    draw_tissues,
    recoloured,
    smooth_field,
    tissue_classes,
    tissue_range,
)

TISSUES = {"air": -995.0, "lung": -850.0, "fat": -100.0, "muscle": 50.0, "vessel": 380.0, "bone": 800.0}
MAY_BE = {  # ranges of radiology texts
    **{"air": (-1024, -960), "lung": (-930, -770), "fat": (-140, -60), "muscle": (10, 90), "vessel": (250, 520)},
    "bone": (550, 1200),
}
VOXELS = {"air": 300, "lung": 40_000, "fat": 20_000, "muscle": 30_000, "vessel": 900, "bone": 800}
NOMINAL_HU = [-60.0, 105.0, 400.0, 390.0, 350.0, 360.0, 330.0]
PLAUSIBLE_HU = {1: (30, 220), 2: (100, 800), 3: (50, 800), 4: (50, 900), 5: (50, 900), 6: (50, 800)}
POOLS = [None, None, "left", "left", "right", "right", "left"]


def thorax(seed=0):
    """Tissues of their usual spread, and which voxel is which."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(TISSUES[name], 8, count) for name, count in VOXELS.items()]
    return np.concatenate(parts).astype(np.float32), np.repeat([*VOXELS], [*VOXELS.values()])


@pytest.mark.parametrize("count", [8, 12, 15])
def test_tissues_stay_distinct_and_themselves_under_every_seed(count):
    image, tissue = thorax()
    classes = tissue_classes(image, count)
    assert len(classes) <= count
    for seed in range(40):
        painted = recoloured(image, classes, draw_tissues(classes, [], np.random.default_rng(seed)))
        means = {name: float(painted[tissue == name].mean()) for name in TISSUES}
        assert all(low < means[name] < high for name, (low, high) in MAY_BE.items()), (seed, means)
        assert np.diff([*means.values()]).min() > 40, (seed, means)


def test_every_seed_paints_tissues_otherwise():
    image, tissue = thorax()
    classes = tissue_classes(image, 12)
    drawn = [draw_tissues(classes, [], np.random.default_rng(seed)) for seed in range(40)]
    means = np.array([[recoloured(image, classes, hu)[tissue == name].mean() for name in TISSUES] for hu in drawn])
    spread = dict(zip(TISSUES, means.std(0), strict=True))
    assert spread["air"] < 8 < spread["lung"]
    assert 4 < spread["fat"] < 20
    assert 4 < spread["muscle"] < 20
    assert spread["bone"] > 50


def test_a_trachea_of_few_voxels_is_a_class_of_its_own():
    classes = tissue_classes(thorax()[0], 12)
    for name, hu in TISSUES.items():
        assert np.abs(classes - hu).min() < 20, (name, classes)


@pytest.mark.parametrize(("values", "classes"), [([], []), ([-100.0] * 9, [-100.0]), ([-100.0, 50.0] * 9, [-100, 50])])
def test_a_background_of_few_intensities_has_as_many_classes(values, classes):
    np.testing.assert_allclose(tissue_classes(np.array(values), 12), classes, atol=3)


def test_classes_follow_from_the_voxels_in_any_order():
    image, _ = thorax()
    np.testing.assert_array_equal(tissue_classes(image, 12), tissue_classes(image[::-1].copy(), 12))


def test_what_was_brighter_is_not_made_darker():
    classes = np.array([-1000.0, -850, -100, 0, 30, 60, 300, 450, 800])
    for seed in range(50):
        assert (np.diff(draw_tissues(classes, [(450, 250)], np.random.default_rng(seed))) >= 0).all()


def test_unlabelled_blood_changes_as_labelled_blood_does():
    classes = np.array([-850.0, -100, 50, 400, 900])
    drawn = draw_tissues(classes, [(420.0, 500.0)], np.random.default_rng(0))
    assert drawn[3] == pytest.approx(400 + 80, abs=3)
    far = draw_tissues(classes, [(420.0, 900.0)], np.random.default_rng(0))
    assert far[3] == pytest.approx(400 + 2 * tissue_range(400.0), abs=5), "and stays what bone may be"


@pytest.mark.parametrize("own", [60.0, float("nan")])
def test_blood_that_looks_like_muscle_or_is_not_seen_leaves_muscle_alone(own):
    classes = np.array([-850.0, -100, 50, 400, 900])
    alone, beside = (draw_tissues(classes, blood, np.random.default_rng(0)) for blood in ([], [(own, 700.0)]))
    np.testing.assert_array_equal(alone, beside)


def test_a_voxel_between_two_classes_lies_as_far_between_their_new_values():
    classes, drawn = np.array([-100.0, 50.0]), np.array([-80.0, 20.0])
    image = np.array([-100, -25, 50, -140, 90], np.float32)
    np.testing.assert_allclose(recoloured(image, classes, drawn), [-80, -30, 20, -120, 60], atol=1e-3)
    np.testing.assert_allclose(recoloured(image, classes, classes), image, atol=1e-3)


def draws(count=200, **options):
    given = {"nominal_hu": NOMINAL_HU, "plausible_hu": PLAUSIBLE_HU, "pools": POOLS, **options}
    return np.array([draw_label_means(**given, rng=np.random.default_rng(seed)) for seed in range(count)])


def test_label_means_are_plausible_and_spread_over_the_range():
    means = draws()
    assert (means[:, 0] == NOMINAL_HU[0]).all()
    for k, (low, high) in PLAUSIBLE_HU.items():
        assert ((means[:, k] >= low) & (means[:, k] <= high)).all()
        assert np.ptp(means[:, k]) > 0.6 * (high - low)
        assert abs(np.median(means[:, k]) - NOMINAL_HU[k]) < 0.2 * (high - low), "most often near the nominal mean"


def test_labels_of_one_pool_share_their_contrast_and_pools_do_not():
    away = draws() - NOMINAL_HU
    for members in ([2, 3, 6], [4, 5]):
        assert (away[:, members].std(1) < 45).all()
        assert away[:, members].std(0).min() > 90
    assert abs(np.corrcoef(away[:, 2], away[:, 4])[0, 1]) < 0.2
    assert abs(np.corrcoef(away[:, 1], away[:, 2])[0, 1]) < 0.2


def test_a_label_without_limits_has_the_range_of_its_tissue():
    lung = draws(nominal_hu=[40.0, -850.0], plausible_hu={}, pools=[None, None])[:, 1]
    assert np.abs(lung + 850).max() <= tissue_range(-850.0)
    assert np.ptp(lung) > tissue_range(-850.0)


def test_a_pool_without_a_common_change_is_refused_by_name():
    with pytest.raises(ValueError, match=r"labels \[2, 3, 6\] of pool left have no change .* correct nominal_hu"):
        draws(count=1, plausible_hu={**PLAUSIBLE_HU, 2: (500, 600), 3: (50, 400)})


def test_a_smooth_field_has_unit_deviation_and_no_edges():
    field = smooth_field((40, 36, 32), [1.5, 1.5, 2.0], np.random.default_rng(0))
    assert field.shape == (40, 36, 32)
    assert field.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(np.diff(field, axis=0)).max() < 0.5
    again, other = (smooth_field((40, 36, 32), [1.5, 1.5, 2.0], np.random.default_rng(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(field, again)
    assert np.abs(field - other).max() > 0.5
    assert smooth_field((1, 1, 1), [40.0] * 3, np.random.default_rng(0)).shape == (1, 1, 1)
