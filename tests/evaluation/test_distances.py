"""Measures of sets: closed forms, what is the same, what is shifted, what was copied, and what is refused."""

import numpy as np
import pytest
from custom.evaluation.distances import (
    copying_p_value,
    distance_ratios,
    frechet_distance,
    kernel_distance,
    local_correlation,
    mean_shifts,
    ms_ssim,
    radiomic_features,
    radiomic_names,
    standardised,
)
from helpers import smooth_volume
from scipy import ndimage

NAMES = ["background", "chamber", "vessel", "absent"]


def normal(cases, features=6, seed=0, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, (cases, features))


def phantom(seed=0, noise_hu=20.0, size=24):
    rng = np.random.default_rng(seed)
    label = np.zeros((size,) * 3, np.int64)
    label[4:16, 4:16, 4:20], label[18:21, 10:13, 3:21] = 1, 2
    return np.array([-60.0, 400.0, 300.0])[label] + rng.normal(0, noise_hu, label.shape), label


def test_features_are_those_of_the_values_they_describe():
    image, label = phantom()
    found = dict(zip(radiomic_names(NAMES), radiomic_features(image, label, num_labels=4), strict=True))
    inside = image[label == 1]
    assert found["chamber: mean"] == pytest.approx(inside.mean(), abs=1e-3)
    assert found["chamber: sd"] == pytest.approx(inside.std(), rel=1e-4)
    assert found["chamber: p95"] == pytest.approx(np.percentile(inside, 95), abs=1e-2)
    assert abs(found["chamber: skewness"]) < 0.3
    assert found["chamber: log volume"] == pytest.approx(np.log(1 + 12 * 12 * 16))
    assert found["grain"] == pytest.approx(20, rel=0.1)
    assert found["absent: log volume"] == 0
    assert np.isnan(found["absent: mean"])


def test_features_tell_texture_apart_from_spread():
    image, label = phantom(noise_hu=0.0, size=32)
    rng = np.random.default_rng(1)
    fine, coarse = rng.normal(size=image.shape), ndimage.gaussian_filter(rng.normal(size=image.shape), 2)
    names = radiomic_names(NAMES)
    of = [
        dict(zip(names, radiomic_features(image + 20 * v / v[label == 1].std(), label, num_labels=4), strict=True))
        for v in (fine, coarse)
    ]
    assert of[0]["chamber: sd"] == pytest.approx(of[1]["chamber: sd"], rel=1e-3)
    assert of[0]["chamber: fine texture"] > 3 * of[1]["chamber: fine texture"]
    assert of[0]["chamber: coarse texture"] < 0.7 * of[1]["chamber: coarse texture"]
    assert of[0]["grain"] > 5 * of[1]["grain"]


def test_texture_of_a_label_does_not_see_what_lies_beside_it():
    image, label = phantom()
    other = np.where(label == 1, image, -900.0)
    at = [k for k, name in enumerate(radiomic_names(NAMES)) if name.startswith("chamber")]
    one, two = (radiomic_features(v, label, num_labels=4)[at] for v in (image, other))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_constant_and_empty_volumes_have_features_without_nan_but_for_what_is_absent():
    features = radiomic_features(np.full((8, 8, 8), 40.0), np.zeros((8, 8, 8), int), num_labels=2)
    assert features[:9] == pytest.approx([40, 0, 0, 40, 40, 40, 0, 0, np.log(513)], abs=1e-4)
    assert features[17] == 0
    assert np.isnan(features[9:17]).all()


def test_standardised_features_have_the_mean_and_spread_of_the_reference():
    reference = normal(50, shift=7.0, scale=3.0) * np.array([1, 100, 1e-3, 1, 1, 1])
    scaled = standardised(reference, reference)
    assert scaled.mean(0) == pytest.approx(np.zeros(6), abs=1e-9)
    assert scaled.std(0, ddof=1) == pytest.approx(np.ones(6))
    shifted = reference + 2 * reference.std(0, ddof=1)
    assert mean_shifts(shifted, reference) == pytest.approx(np.full(6, 2.0))


def test_missing_features_are_neither_near_nor_far_and_constant_ones_left_out():
    reference = np.column_stack([normal(20), np.full(20, 5.0), np.full(20, np.nan)])
    reference[0, 0] = np.nan
    sample = np.full((1, 8), np.nan)
    assert standardised(sample, reference).tolist() == [[0.0] * 6]
    shifts = mean_shifts(np.ones((3, 8)), reference)
    assert np.isfinite(shifts[:6]).all()
    assert np.isnan(shifts[6:]).all()


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (np.ones((3, 4)), np.ones((3, 5)), r"equal features .* are needed, got \(3, 4\) and \(3, 5\)"),
        (np.ones((3, 4)), np.ones((1, 4)), r"at least two reference cases are needed, got \(3, 4\) and \(1, 4\)"),
        (np.ones((3, 4)), np.ones((3, 4)), "none varies in the reference set; all its cases are the same"),
    ],
)
def test_sets_that_give_no_scale_are_refused(features, reference, message):
    with pytest.raises(ValueError, match=message):
        standardised(features, reference)


def test_kernel_distance_by_hand():
    """One feature: k(x, y) = (xy + 1)^3, x = 0, 1 and y = 1, 2: kernels 1; 27; and 1, 1, 8, 27."""
    value, spread = kernel_distance(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]))
    assert value == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)
    assert np.isnan(spread)


def test_kernel_distance_of_one_distribution_is_zero_on_average_at_few_cases_and_unequal_numbers():
    values = [kernel_distance(normal(8, seed=s), normal(13, seed=100 + s), subsets=0)[0] for s in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    assert min(values) < 0 < max(values)


def test_kernel_distance_grows_with_a_shift_and_with_a_spread():
    reference = normal(40, seed=1)
    shifted = [kernel_distance(normal(40, shift=s), reference)[0] for s in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted)
    value, spread = kernel_distance(normal(40, shift=1.0), reference)
    assert value > 3 * spread > 0
    assert kernel_distance(normal(40, scale=2.0), reference)[0] > 3 * abs(shifted[0])


def test_kernel_distance_depends_on_the_seed_in_its_spread_only_and_refuses_single_cases():
    a, b = normal(10), normal(10, seed=1)
    assert kernel_distance(a, b, seed=3) == kernel_distance(a, b, seed=3)
    assert kernel_distance(a, b, seed=3)[0] == kernel_distance(a, b, seed=4)[0]
    with pytest.raises(ValueError, match="two cases of each set are needed, got 1 and 10"):
        kernel_distance(a[:1], b)


def test_frechet_distance_is_that_of_the_fitted_gaussians():
    a = normal(400, features=3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a + 2.0, a) == pytest.approx(3 * 4.0)
    sd = np.linalg.eigvalsh(np.cov(a, rowvar=False)).sum()
    assert frechet_distance(a * 3.0, a - a.mean(0) + 3 * a.mean(0)) == pytest.approx(4 * sd)  # (3 s - s)^2


def test_frechet_distance_is_refused_at_too_few_cases_with_the_numbers():
    with pytest.raises(ValueError, match="6 features need 12 cases in each set, got 12 and 11; use kernel_distance"):
        frechet_distance(normal(12), normal(11))
    assert np.isfinite(frechet_distance(normal(12), normal(12, seed=1)))


def test_copies_of_training_cases_are_much_nearer_to_them_and_new_cases_are_not():
    training, held_out = normal(30, 20, seed=0), normal(30, 20, seed=1)
    copies, new = training + normal(30, 20, seed=2, scale=0.1), normal(30, 20, seed=3)
    assert np.median(distance_ratios(copies, training, held_out)) < 0.2
    assert np.median(distance_ratios(new, training, held_out)) == pytest.approx(1, abs=0.1)
    assert copying_p_value(copies, training, held_out) < 1e-6
    assert copying_p_value(new, training, held_out) > 0.01


def test_ratios_of_held_out_cases_leave_themselves_out_and_follow_the_numbers_of_cases():
    training, held_out, new = normal(200, 5, seed=0), normal(10, 5, seed=1), normal(100, 5, seed=2)
    own = distance_ratios(held_out, training, held_out)
    assert np.isfinite(own).all()
    assert np.median(own) < 0.8  # of 200 cases one is nearer than of 9
    assert np.median(own) == pytest.approx(np.median(distance_ratios(new, training, held_out)), abs=0.15)


def test_a_copy_of_a_held_out_case_is_infinitely_far_from_training_and_one_of_both_undefined():
    training, held_out = normal(5), normal(5, seed=1)
    assert distance_ratios(held_out[:1].copy(), training, held_out).tolist() == [np.inf]
    both = np.concatenate([held_out[:1], training])
    assert np.isnan(distance_ratios(held_out[:1].copy(), both, held_out)).all()


def test_ms_ssim_is_one_for_equal_volumes_and_falls_with_noise_and_other_structure():
    first, other = smooth_volume(0), smooth_volume(1)
    noise = np.random.default_rng(2).normal(0, 0.1, first.shape)
    assert ms_ssim(first, first) == pytest.approx(1, abs=1e-6)
    assert 0 <= ms_ssim(first, other) < 0.5 < ms_ssim(first, first + noise) < 0.97
    assert ms_ssim(first, other) == pytest.approx(ms_ssim(other, first), abs=1e-6)


def test_volumes_too_small_for_the_scales_are_refused():
    with pytest.raises(ValueError, match=r"four scales need 63 voxels along each axis, got \(64, 62, 64\)"):
        ms_ssim(np.zeros((64, 62, 64)), np.zeros((64, 62, 64)))
    assert ms_ssim(np.zeros((63, 63, 63)), np.zeros((63, 63, 63))) == pytest.approx(1)


def test_local_correlation_finds_copies_in_any_contrast_and_nothing_in_other_or_flat_volumes():
    first, other = smooth_volume(0, 32), smooth_volume(1, 32)
    inside = np.zeros(first.shape, bool)
    inside[4:28, 4:28, 4:28] = True
    assert local_correlation(first, 0.3 * first + 0.5, inside) == pytest.approx(1, abs=0.01)
    assert local_correlation(first, 1 - first, inside) == pytest.approx(-1, abs=0.01)
    assert abs(local_correlation(first, other, inside)) < 0.15
    assert local_correlation(first, np.full_like(first, 0.3), inside) == pytest.approx(0, abs=1e-6)
    assert np.isnan(local_correlation(first, other, np.zeros_like(inside)))


def test_local_correlation_falls_as_noise_covers_a_copy():
    first, rng = smooth_volume(0, 32), np.random.default_rng(5)
    noise = rng.normal(size=first.shape)
    values = [local_correlation(first, first + s * noise, np.ones_like(first)) for s in (0.02, 0.1, 0.5)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.9
