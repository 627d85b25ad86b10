"""Measures of realism: planted specks, filters whose spectrum is known, and sets that differ or do not."""

import numpy as np
import pytest
import torch
from custom.evaluation import realism
from custom.evaluation.realism import (
    BANDS,
    _bands,
    draw_patches,
    edge_speckle,
    interior_spectrum,
    spectrum_ratio,
    two_sample_auc,
)
from scipy import ndimage

SHAPE = (34, 32, 30)


def heart(shape=SHAPE):
    """Two chambers side by side in a background, and a vessel apart."""
    label = np.zeros(shape, np.int64)
    label[4:16, 5:27, 5:25], label[16:28, 5:27, 5:25] = 1, 2
    label[30:32, 10:12, 3:27] = 3
    return label


def structure(label):
    return np.array([-60.0, 400.0, 300.0, 350.0])[label]


def white(sd, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(0, sd, shape)


# Speckle at edges


def plane():
    """Labels 1 and 2 that meet in a plane: voxels 7 and 8 are edge."""
    label = np.ones((16, 18, 20), np.int64)
    label[8:] = 2
    return label


def test_flat_walls_have_no_speckle():
    label = plane()
    assert edge_speckle(structure(label), label) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_planted_specks_count_by_their_height_and_share_of_the_edge(sign):
    """Every third voxel along both axes of one side: alone in its 3^3 cube, so the median does not see it."""
    label = plane()
    image = structure(label)
    image[8, ::3, ::3] += sign * 90.0
    share = image[8, ::3, ::3].size / (2 * 18 * 20)
    assert edge_speckle(image, label) == pytest.approx(90 * share**0.5, rel=1e-5)


def test_specks_away_from_edges_do_not_count():
    label = plane()
    image = structure(label)
    image[2, ::3, ::3] += 90.0
    image[13, ::3, ::3] -= 90.0
    assert edge_speckle(image, label) == 0


def test_speckle_grows_in_proportion_to_the_noise_and_a_blur_takes_it():
    label = heart()
    noisy, twice = (edge_speckle(white(sd), label) for sd in (30.0, 60.0))
    assert twice == pytest.approx(2 * noisy, rel=1e-5)
    assert edge_speckle(ndimage.gaussian_filter(white(30.0), 0.8), label) < 0.5 * noisy


def test_background_around_the_labels_changes_nothing():
    label = heart()
    image = structure(label) + white(30.0)
    margin = [(7, 3), (0, 9), (5, 5)]
    wider = np.pad(image, margin, mode="reflect"), np.pad(label, margin)
    assert edge_speckle(*wider) == pytest.approx(edge_speckle(image, label), rel=1e-6)


@pytest.mark.parametrize("value", [0, 1])
def test_where_no_labels_meet_there_is_no_speckle_to_speak_of(value):
    assert np.isnan(edge_speckle(white(30.0), np.full(SHAPE, value)))


# Spectrum inside labels


def test_spectrum_of_white_noise_is_its_variance_in_every_band_whatever_the_labels_and_their_edges():
    label = heart()
    image = structure(label) + 700 * (label == 3) + white(30.0)
    found = interior_spectrum(image, label, [1, 2])
    assert found.shape == (len(BANDS) - 1,)
    np.testing.assert_allclose(found, 900, rtol=0.2)
    np.testing.assert_allclose(found, interior_spectrum(white(30.0), label, [1, 2]), rtol=0.05)


def test_what_lies_within_two_voxels_of_an_edge_is_not_interior():
    label, image = heart(), white(30.0)
    near = ndimage.maximum_filter(label, 5) != ndimage.minimum_filter(label, 5)
    diamond = np.zeros(SHAPE, bool)
    for k in (1, 2):
        diamond |= ndimage.binary_erosion(label == k, iterations=2)
    assert not near[diamond & ~near].any()
    spoilt = np.where(diamond, image, 1e4)
    np.testing.assert_allclose(interior_spectrum(spoilt, label, [1, 2]), interior_spectrum(image, label, [1, 2]))


@pytest.mark.parametrize("labels", [[3], [7], []], ids=["too thin", "absent", "none"])
def test_without_an_interior_the_spectrum_is_unknown(labels):
    found = interior_spectrum(white(30.0), heart(), labels)
    assert found.shape == (len(BANDS) - 1,)
    assert np.isnan(found).all()


def spectra(cases, sigma_voxels, *, factor=1.0, seed=0):
    label = heart()
    filtered = [ndimage.gaussian_filter(white(30.0, seed=seed + k), sigma_voxels) for k in range(cases)]
    return np.array([interior_spectrum(factor * noise + structure(label), label, [1, 2]) for noise in filtered])


def test_ratio_of_spectra_of_filtered_noise_is_that_of_the_filters():
    """Gaussians of 0.5 and 0.4 voxels: exp(-(2 pi f)^2 (0.25 - 0.16)), from 1 where f is 0."""
    rows = spectra(4, 0.5), spectra(4, 0.4)
    kernels = [ndimage.gaussian_filter1d(np.eye(17)[8], sigma) for sigma in (0.5, 0.4)]
    powers = [np.abs(np.fft.fft(kernel)) ** 2 for kernel in kernels]
    full = [(p[:, None, None] * p[:, None] * p[:9]) for p in powers]
    axes = np.ix_(np.fft.fftfreq(17), np.fft.fftfreq(17), np.fft.rfftfreq(17))
    radius = np.sqrt(sum(axis**2 for axis in axes))
    bands = [(low <= radius) & (radius < high) for low, high in zip(BANDS, BANDS[1:], strict=False)]
    expected = [full[0][band].mean() / full[1][band].mean() for band in bands]
    ratio = spectrum_ratio(*rows)
    assert expected[0] > 0.8 > 0.6 > expected[-1]
    assert ratio == pytest.approx(expected, rel=0.06)


def test_ratio_of_spectra_is_the_square_of_a_factor_and_cases_without_one_do_not_count():
    real = spectra(3, 0.0)
    unknown = np.full((1, len(BANDS) - 1), np.nan)
    ratio = spectrum_ratio(np.concatenate([unknown, spectra(3, 0.0, factor=1.5)]), np.concatenate([real, unknown]))
    assert ratio == pytest.approx([2.25] * (len(BANDS) - 1), rel=1e-6)


# Patches


def test_patches_show_image_and_mask_in_their_units_and_are_the_same_for_a_seed():
    label = heart((48, 40, 36))
    image = structure(label)
    patches = draw_patches(image, label, count=6, num_labels=4, seed=3)
    assert patches.shape == (6, 2, 24, 24, 24)
    assert patches.dtype == torch.float16
    assert type(patches) is torch.Tensor
    ids = (patches[:, 1].float() * 3).round().long()
    torch.testing.assert_close(
        patches[:, 0].float(), torch.from_numpy(structure(ids.numpy())).float() / 500, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(patches, draw_patches(image, label, count=6, num_labels=4, seed=3))
    assert not torch.equal(patches, draw_patches(image, label, count=6, num_labels=4, seed=4))


def test_patches_lie_around_labels_each_as_often_as_another():
    """A patch at a vessel of 96 voxels is as likely as one at a chamber of 5000."""
    label = np.zeros((90, 30, 30), np.int64)
    label[8:24, 4:26, 4:26] = 1
    label[74:76, 12:14, 3:27] = 2
    patches = draw_patches(structure(label), label, count=200, num_labels=3, seed=0)
    ids = (patches[:, 1].float() * 2).round()
    shown = torch.stack([(ids == k).flatten(1).any(1) for k in (1, 2)])
    assert (shown.sum(0) == 1).all()
    assert float(shown[1].float().mean()) == pytest.approx(0.5, abs=0.11)  # three standard errors


def test_a_volume_smaller_than_a_patch_is_continued():
    label = np.zeros((10, 30, 17), np.int64)
    label[2:8, 5:25, 3:15] = 1
    patches = draw_patches(structure(label), label, count=2, num_labels=2, seed=0)
    assert patches.shape == (2, 2, 24, 24, 24)
    assert torch.equal(patches[:, :, 9:, :, :17], patches[:, :, 9:10, :, :17].expand(-1, -1, 15, -1, -1))


# The two-sample test


def cases_of(count, *, seed, shift=0.0, size=8):
    """Cases of twelve patches of noise."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(12, 2, size, size, size, generator=generator) + shift).half() for _ in range(count)]


def test_sets_of_one_distribution_cannot_be_told_apart():
    result = two_sample_auc(cases_of(6, seed=0), cases_of(6, seed=1), steps=5, repeats=1)
    assert result["mean"] == pytest.approx(0.5, abs=0.15)  # 144 patches: a standard error of 0.05
    assert result.keys() == {"mean", "sd"}


def test_an_obvious_difference_is_seen():
    result = two_sample_auc(cases_of(3, seed=0), cases_of(3, seed=1, shift=1.0), steps=8, repeats=1)
    assert result["mean"] > 0.95
    assert result["sd"] < 0.05


def test_missing_grain_is_seen_however_much_the_contrast_differs():
    """Edges of 200 to 600 HU between cases, and grain of 30 HU that one set has and the other not."""
    rng = np.random.default_rng(0)

    def cases(noise_sd_hu):
        half = np.repeat([0.0, 1.0], 4)[:, None, None]
        image = [half * rng.uniform(200, 600) + rng.normal(0, noise_sd_hu, (12, 8, 8, 8)) for _ in range(4)]
        return [torch.from_numpy(np.stack([v / 500, 0 * v + half], 1)).half() for v in image]

    assert two_sample_auc(cases(0.0), cases(30.0), steps=15)["mean"] > 0.95


def test_the_network_reads_the_mean_of_a_block_its_details_in_units_of_grain_and_the_mask():
    """Planes of +10 and -10 HU around 250 HU along the last axis, one of eight bands: 10 sqrt(8) HU of detail."""
    patches = torch.full((1, 2, 4, 6, 8), 0.5)
    patches[:, 0, ..., ::2] += 10 / 500
    patches[:, 0, ..., 1::2] -= 10 / 500
    bands = _bands(patches.double())
    assert bands.shape == (1, 16, 2, 3, 4)
    expected = torch.zeros(16)
    expected[0], expected[1], expected[8] = 0.5, np.arcsinh(8**0.5 / 2), 0.5 * 8**0.5
    torch.testing.assert_close(bands[0], expected[:, None, None, None].expand(16, 2, 3, 4), rtol=1e-4, atol=1e-4)


def test_a_test_is_repeated_by_its_seed_and_leaves_the_global_generator_alone():
    made, real = cases_of(2, seed=0), cases_of(3, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = two_sample_auc(made, real, steps=1, repeats=1, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert two_sample_auc(made, real, steps=1, repeats=1, seed=7) == first
    assert two_sample_auc(made, real, steps=1, repeats=1, seed=8) != first


@pytest.mark.parametrize(("made", "real"), [(2, 2), (3, 5)])
def test_patches_of_a_case_are_trained_on_or_asked_about_never_both(monkeypatch, made, real):
    """Each fold trains on half of the cases of each set, and the folds of a halving change places."""
    folds = []

    def record(patches, is_made, trained, *, steps, seed):
        folds.append((is_made, trained))
        return float(len(folds))

    monkeypatch.setattr(realism, "_auc_of_fold", record)
    result = two_sample_auc(cases_of(made, seed=0, size=2), cases_of(real, seed=1, size=2), repeats=3)
    assert len(folds) == 6
    for is_made, trained in folds:
        by_case = trained.view(made + real, 12)
        assert torch.equal(by_case.all(1), by_case.any(1))
        assert is_made.view(made + real, 12)[:, 0].tolist() == [True] * made + [False] * real
        for number, part in ((made, by_case[:made, 0]), (real, by_case[made:, 0])):
            assert int(part.sum()) in (number // 2, number - number // 2)
    for (_, first), (_, second) in zip(folds[::2], folds[1::2], strict=True):
        assert torch.equal(first, ~second)
    assert result == {"mean": pytest.approx(3.5), "sd": pytest.approx(np.std([1, 2, 3, 4, 5, 6]))}


@pytest.mark.parametrize(("made", "real"), [(1, 2), (3, 1)])
def test_one_case_of_a_set_cannot_be_halved(made, real):
    with pytest.raises(ValueError, match=f"two cases of each set are needed .*, got {made} and {real}"):
        two_sample_auc(cases_of(made, seed=0, size=2), cases_of(real, seed=1, size=2))
