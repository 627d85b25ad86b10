"""Statistics of labels, the split into structure and grain, and grain drawn anew, against noise of known strength."""

import numpy as np
import pytest
import torch
from custom.volumes.grain import (
    draw_grain,
    fine_spectrum,
    gaussian_spectrum,
    grain_kernel,
    grain_spectrum,
    local_sd,
    power_spectrum,
    with_grain,
)
from custom.volumes.intensity import interior, interior_noise_sd, label_statistics, noise_sd, split_noise
from scipy import ndimage

SHAPE = (40, 36, 33)


def white(sd, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(0, sd, shape).astype(np.float32)


def box(shape=SHAPE, margin=4, value=1):
    label = np.zeros(shape, np.int64)
    label[margin:-margin, margin:-margin, margin:-margin] = value
    return label


# Statistics


def test_label_statistics_are_those_of_numpy():
    rng = np.random.default_rng(0)
    image, label = rng.normal(1000, 50, (7, 9, 11)), rng.integers(-1, 6, (7, 9, 11))
    label[label == 3] = 0
    table = label_statistics(torch.from_numpy(image), torch.from_numpy(label), 5)  # -1 and 5 are left out
    assert table.shape == (5, 2)
    assert table.dtype == torch.float32
    for index in (0, 1, 2, 4):
        inside = image[label == index]
        np.testing.assert_allclose(table[index], [inside.mean(), inside.std()], rtol=1e-5)
    assert table[3].isnan().all()


@pytest.mark.parametrize(("voxels", "known"), [(7, False), (8, True)])
def test_labels_of_fewer_than_eight_voxels_are_absent(voxels, known):
    label = torch.zeros(4, 4, 4)
    label.flatten()[:voxels] = 1
    table = label_statistics(torch.full((4, 4, 4), 120.0), label, 2)
    assert bool(table[1].isfinite().all()) is known
    if known:
        assert table[1].tolist() == [120.0, 0.0]


# Noise


@pytest.mark.parametrize("sd", [5.0, 30.0])
def test_noise_sd_of_white_noise(sd):
    assert noise_sd(white(sd) + 300, box()) == pytest.approx(sd, rel=0.05)


def test_noise_sd_ignores_edges():
    """Chamber steps of 300 HU every eight voxels leave the estimate within 10 %."""
    steps = 300.0 * (np.indices(SHAPE) // 8).sum(0) % 600
    assert noise_sd(white(30.0) + steps, box()) == pytest.approx(30.0, rel=0.1)


def test_noise_sd_looks_inside_the_labels_only():
    image, label = white(20.0), box(margin=8)
    image[label == 0] *= 50
    assert noise_sd(image, label) == pytest.approx(20.0, rel=0.1)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (np.full(SHAPE, 40.0), box()),
        (white(20.0), np.zeros(SHAPE, int)),
        (white(20.0, (1, 4, 4)), np.ones((1, 4, 4), int)),
    ],
    ids=["constant", "no labels", "one voxel thick"],
)
def test_noise_sd_is_zero_where_nothing_can_be_measured(image, label):
    assert noise_sd(image, label) == 0.0


def chambers():
    """Three labels of 11 x 28 x 25 voxels side by side."""
    label = box()
    label[label > 0] = 1 + (np.indices(SHAPE)[0][label > 0] - 4) // 11
    return label


def test_interior_noise_is_the_median_over_labels():
    """Noise of 20 and 22 HU, and one label with trabeculae."""
    label = chambers()
    image = white(1.0) * np.array([500.0, 20.0, 80.0, 22.0])[label] + 100 * label
    assert interior_noise_sd(image, label) == pytest.approx(22, rel=0.06)
    assert noise_sd(image, label) > 24


def test_interior_noise_is_measured_away_from_the_edges_of_a_label():
    label = chambers()
    core = np.zeros(SHAPE, bool)
    for k in (1, 2, 3):
        core |= ndimage.binary_erosion(label == k, iterations=2)
    image = np.where(core, white(20.0), white(300.0, seed=1))
    assert interior_noise_sd(image, label) == pytest.approx(20, rel=0.06)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_interior_is_the_erosion_of_every_label_by_itself(dtype):
    """Labels of any form, among them some at the border of the volume."""
    noise = ndimage.gaussian_filter(white(1.0, (31, 28, 25)), 3)
    label = np.digitize(noise, np.quantile(noise, [0.2, 0.5, 0.8])).astype(dtype)
    core = interior(label)
    assert core.dtype == dtype
    for k in (1, 2, 3):
        expected = ndimage.binary_erosion(label == k, iterations=2)
        assert np.array_equal(core == k, expected)
        assert expected.any()


def test_interior_noise_is_that_of_the_interior_of_each_label_measured_alone():
    """To the last bit, on a volume of odd sizes."""
    label = chambers()
    image = white(1.0) * np.array([500.0, 20.0, 80.0, 22.0])[label] + 100 * label
    alone = [noise_sd(image, ndimage.binary_erosion(label == k, iterations=2)) for k in (1, 2, 3)]
    assert interior_noise_sd(image, label) == np.median(alone)


def test_interior_noise_of_labels_too_small_is_that_of_all_of_them():
    label = np.zeros(SHAPE, np.int64)
    label[4:12, 4:12, 4:12], label[20:28, 4:12, 4:12] = 1, 2  # 64 voxels inside each
    image = white(20.0)
    assert interior_noise_sd(image, label) == noise_sd(image, label) == pytest.approx(20, rel=0.15)
    assert interior_noise_sd(image, np.zeros(SHAPE, np.int64)) == 0


def test_split_adds_up_and_takes_grain_not_structure():
    structure = 100.0 + 300.0 * (box(margin=12) > 0)
    image = (structure + white(30.0)).astype(np.float32)
    smooth, grain = split_noise(image, box())
    np.testing.assert_allclose(smooth + grain, image, atol=1e-3)
    assert smooth.dtype == grain.dtype == np.float32
    assert np.abs(smooth - structure).mean() < 0.5 * np.abs(image - structure).mean()
    deep = ndimage.binary_erosion(box(margin=12) > 0, iterations=2)
    assert smooth[deep].mean() == pytest.approx(400.0, abs=25)
    assert 0.5 * 30 < grain[deep].std() < 1.1 * 30


def test_split_of_a_constant_image_is_the_image_and_zero():
    image = np.full(SHAPE, 70.0)
    smooth, grain = split_noise(image, box())
    assert np.array_equal(smooth, image)
    assert not grain.any()
    assert smooth.dtype == grain.dtype == np.float32


# Spectrum and kernel

LARGE = (56, 52, 48)


def gaussian_kernel(sigma_voxels):
    """Filter (17, 17, 17) of unit norm: white noise of unit variance keeps it."""
    kernel = np.zeros((17, 17, 17))
    kernel[8, 8, 8] = 1
    kernel = ndimage.gaussian_filter(kernel, sigma_voxels)
    return kernel / np.linalg.norm(kernel)


def coloured(sigma_voxels, shape=LARGE, seed=0):
    """Noise of unit variance with the spectrum of `gaussian_kernel`."""
    return ndimage.convolve(white(1.0, shape, seed), gaussian_kernel(sigma_voxels)[4:13, 4:13, 4:13], mode="wrap")


def regions(shape=LARGE):
    """A box, a hollow shell, and a region that touches the border in scattered columns."""
    thick = box(shape, 5) > 0
    shell = (box(shape, 3) > 0) & ~ndimage.binary_erosion(box(shape, 3) > 0, iterations=6)
    columns = np.random.default_rng(1).random(shape[:2])[..., None] > 0.5
    return {"box": thick, "shell": shell, "columns": np.broadcast_to(columns, shape)}


def banded(power):
    """Mean over five bands of the radius."""
    axes = np.ix_(np.fft.fftfreq(17), np.fft.fftfreq(17), np.fft.rfftfreq(17))
    radius = np.sqrt(sum(axis**2 for axis in axes))
    return np.array([power[(low <= radius) & (radius < low + 0.1)].mean() for low in (0.0, 0.1, 0.2, 0.3, 0.4)])


@pytest.mark.parametrize("region", ["box", "shell", "columns"])
def test_white_noise_has_a_flat_spectrum_of_its_variance_in_any_region(region):
    power = power_spectrum(white(30.0, LARGE), regions()[region])
    assert power.shape == (17, 17, 9)
    assert power.min() >= 0
    np.testing.assert_allclose(banded(power), 900, rtol=0.1)


@pytest.mark.parametrize("region", ["box", "shell", "columns"])
def test_spectrum_of_filtered_noise_is_that_of_the_filter(region):
    """Its autocovariance is the filter's autocorrelation, here with the taper that brings it to nothing at 9 voxels."""
    covariance = np.fft.irfftn(np.abs(np.fft.rfftn(gaussian_kernel(0.8))) ** 2, (17,) * 3)
    taper = np.fft.ifftshift(np.cos(np.pi * np.arange(-8, 9) / 18) ** 2)
    covariance *= taper[:, None, None] * taper[:, None] * taper
    expected = banded(np.fft.rfftn(covariance).real)
    found = banded(power_spectrum(20 * coloured(0.8), regions()[region])) / 400
    assert expected[0] > 15 * expected[3]
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.005 * expected[0])


def test_spectrum_does_not_see_the_mean_of_the_region_nor_what_lies_outside():
    values, inside = white(30.0, LARGE), regions()["box"]
    spoilt = np.where(inside, values + 500, 1e4)
    np.testing.assert_allclose(power_spectrum(spoilt, inside), power_spectrum(values, inside), rtol=1e-3, atol=0.5)


def kernel_of(grain, label):
    """Of a scan without structure."""
    return grain_kernel(grain_spectrum(np.zeros_like(grain), grain, label))


@pytest.mark.parametrize("region", ["box", "shell", "columns"])
@pytest.mark.parametrize("sigma_voxels", [0.0, 0.6, 0.9])
def test_kernel_is_the_filter_that_made_the_noise_whatever_the_region(sigma_voxels, region):
    kernel = kernel_of(25 * coloured(sigma_voxels), regions()[region].astype(int))
    assert kernel.shape == (17, 17, 17)
    assert kernel.dtype == np.float32
    assert np.linalg.norm(kernel) == pytest.approx(1, abs=1e-5)
    expected = gaussian_kernel(sigma_voxels)
    assert np.abs(kernel - expected).max() < 0.065  # what is coarse is taken off
    assert float((kernel * expected).sum()) > 0.92  # of unit norm both: 1 is the same


def test_kernel_does_not_carry_edges_outside_the_labels():
    grain, label = (25 * coloured(0.6)).astype(np.float32), box(LARGE, 6)
    spoilt = np.where(label > 0, grain, 1000.0 * (np.indices(LARGE).sum(0) // 6 % 2)).astype(np.float32)
    assert np.array_equal(kernel_of(spoilt, label), kernel_of(grain, label))


def test_a_little_of_an_edge_inside_the_labels_hardly_changes_the_kernel():
    """A sheet of 20 deviations, which is clipped to three of all; unclipped it would be most of the energy."""
    grain, label = 25 * coloured(0.6), box(LARGE, 5)
    spoilt = grain.copy()
    spoilt[28, 15:40, 15:40] += 500.0
    assert np.square(spoilt[label > 0]).mean() > 3 * np.square(grain[label > 0]).mean()
    assert float((kernel_of(spoilt, label) * kernel_of(grain, label)).sum()) > 0.85  # 0.63 unclipped


@pytest.mark.parametrize(
    ("grain", "label"),
    [(np.zeros(SHAPE, np.float32), box()), (white(20.0), np.zeros(SHAPE, int))],
    ids=["no grain", "no labels"],
)
def test_kernel_of_nothing_leaves_noise_white(grain, label):
    kernel, noise = kernel_of(grain, label), white(1.0)
    assert kernel.sum() == kernel[8, 8, 8] == 1
    np.testing.assert_allclose(draw_grain(kernel, noise), noise[8:-8, 8:-8, 8:-8], atol=1e-5)


def test_noise_is_told_from_coarse_texture_and_from_labels_that_have_more():
    """A bias field of 200 HU and a third label of five times the noise do not change the spectrum of the other two."""
    noise, label = 20 * coloured(0.7), np.zeros(LARGE, int)
    for k, part in enumerate((slice(2, 18), slice(18, 34), slice(34, 54)), start=1):
        label[part, 2:-2, 2:-2] = k
    field = 200 * np.sin(np.arange(LARGE[2]) / LARGE[2] * np.pi)
    plain = fine_spectrum(noise, label)
    spoilt = fine_spectrum(noise * np.where(label == 3, 5, 1) + field, label)
    np.testing.assert_allclose(spoilt.mean(), plain.mean(), rtol=0.3)  # the median of three is now the larger of two
    assert float((grain_kernel(spoilt) * grain_kernel(plain)).sum()) > 0.98


def test_labels_that_are_too_small_have_no_fine_spectrum_and_the_grain_has_to_do():
    label = np.zeros(LARGE, int)
    label[10:14, 10:14, 10:40] = 1
    grain = 20 * coloured(0.7)
    assert not fine_spectrum(grain, label).any()
    assert grain_spectrum(np.zeros_like(grain), grain, label).any()


# Grain drawn anew


def noise_for(shape, seed=0):
    """White noise for grain of a shape, drawn through a kernel of 17 voxels."""
    return white(1.0, [n + 16 for n in shape], seed)


@pytest.mark.parametrize("sigma_voxels", [0.0, 0.7, 1.2])
def test_drawn_grain_has_unit_variance_and_the_spectrum_of_its_kernel(sigma_voxels):
    kernel = gaussian_kernel(sigma_voxels).astype(np.float32)
    drawn = draw_grain(kernel, noise_for(LARGE, seed=3))
    assert drawn.shape == LARGE
    assert drawn.dtype == np.float32
    assert drawn.std() == pytest.approx(1, abs=0.05)
    again = kernel_of(drawn, np.ones(LARGE, int))
    assert float((again * kernel).sum()) > 0.97


@pytest.mark.parametrize("side", [0, -1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_drawn_grain_is_as_strong_at_the_border_as_inside(axis, side):
    """Where noise ends, a filter of 1.2 voxels has half of its energy left."""
    volumes = [draw_grain(gaussian_kernel(1.2), noise_for(LARGE, seed)) for seed in range(4)]
    border = np.array([np.take(volume, side, axis) for volume in volumes])
    assert border.std() == pytest.approx(1, abs=0.05)
    assert np.mean(volumes) == pytest.approx(0, abs=0.05)


def test_drawn_grain_at_one_border_has_nothing_to_do_with_that_at_the_other():
    volumes = [draw_grain(gaussian_kernel(1.2), noise_for(LARGE, seed)) for seed in range(4)]
    first, last = (np.array([np.take(volume, side, 0) for volume in volumes]) for side in (0, -1))
    assert abs(np.corrcoef(first.ravel(), last.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("shape", [(5, 30, 9), (1, 1, 40), (21, 4, 18)])
def test_drawn_grain_is_that_of_the_noise_around_each_voxel_even_where_the_kernel_is_larger(shape):
    kernel, noise = gaussian_kernel(0.7), noise_for(shape)
    drawn = draw_grain(kernel, noise)
    assert drawn.shape == shape
    expected = ndimage.convolve(noise, kernel)[tuple(slice(8, 8 + n) for n in shape)]
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_a_voxel_of_noise_draws_the_kernel_around_it():
    noise = np.zeros((47, 45, 43))
    noise[22, 23, 20] = 1
    kernel = np.random.default_rng(0).standard_normal((17, 17, 17))
    np.testing.assert_allclose(draw_grain(kernel, noise)[6:23, 7:24, 4:21], kernel, atol=1e-5)


def test_local_sd_of_even_grain_is_its_deviation_everywhere():
    sd = local_sd(white(25.0), box())
    assert sd.shape == SHAPE
    assert sd.dtype == np.float32
    assert sd.mean() == pytest.approx(25, rel=0.05)
    assert sd.std() < 2.5


def test_local_sd_follows_grain_from_place_to_place():
    grain = white(20.0, (60, 30, 30))
    grain[30:] *= 2
    sd = local_sd(grain, box(grain.shape))
    assert sd[:18].mean() == pytest.approx(20, rel=0.06)
    assert sd[42:].mean() == pytest.approx(40, rel=0.06)
    assert (np.diff(sd[20:40].mean((1, 2))) > 0).all()


def test_local_sd_is_not_that_of_edges_that_denoising_missed():
    """A sheet of 1000 HU counts as three deviations of what lies in the labels."""
    grain, label = white(20.0), box()
    grain[1] = 1000.0  # outside the labels
    assert local_sd(grain, label).max() < 3 * 20 * 1.05
    assert local_sd(grain, label)[20:].mean() == pytest.approx(20, rel=0.06)


def test_local_sd_without_labels_is_that_of_the_image_and_without_grain_zero():
    assert local_sd(white(25.0), np.zeros(SHAPE, int)).mean() == pytest.approx(25, rel=0.05)
    assert not local_sd(np.zeros(SHAPE, np.float32), box()).any()


def grainy(structure, noise_sd_hu, *, strength=None, label=None, seed=7):
    return with_grain(
        structure.astype(np.float32),
        box() if label is None else label,
        unit_grain=white(1.0, seed=seed),
        local_sd_hu=np.full(SHAPE, 5.0, np.float32) if strength is None else strength,
        noise_sd_hu=noise_sd_hu,
    )


STEPS = 300.0 * (np.indices(SHAPE) // 8).sum(0) % 600


@pytest.mark.parametrize("noise_sd_hu", [4.0, 30.0])
@pytest.mark.parametrize("structure", [np.full(SHAPE, 70.0), STEPS], ids=["flat", "edges"])
@pytest.mark.parametrize("own", [0.0, 0.5, 0.9], ids=["clean", "half", "nearly all"])
def test_grain_reaches_the_wanted_noise_whatever_the_structure_has(structure, own, noise_sd_hu):
    structure = structure + white(own * noise_sd_hu, seed=2)
    image = grainy(structure, noise_sd_hu)
    assert image.dtype == np.float32
    assert interior_noise_sd(image, box()) == pytest.approx(noise_sd_hu, rel=0.02)
    added = image - structure
    assert abs(np.corrcoef(added.ravel(), white(1.0, seed=7).ravel())[0, 1]) > 0.999


def test_grain_is_as_strong_in_every_place_as_it_is_told():
    strength = np.where(np.indices(SHAPE)[0] < 20, 1.0, 3.0).astype(np.float32)
    added = grainy(np.zeros(SHAPE), 30.0, strength=strength)
    assert added[20:].std() / added[:20].std() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("noise_sd_hu", [0.0, 19.0])
def test_a_structure_with_more_noise_than_wanted_is_left_alone(noise_sd_hu):
    structure = STEPS + white(21.0, seed=2)
    assert np.array_equal(grainy(structure, noise_sd_hu), structure.astype(np.float32))


@pytest.mark.parametrize(
    ("strength", "label"),
    [(np.zeros(SHAPE, np.float32), box()), (None, np.zeros(SHAPE, int))],
    ids=["no grain", "no labels"],
)
def test_without_grain_or_labels_to_measure_it_in_the_structure_stays(strength, label):
    assert np.array_equal(grainy(STEPS, 30.0, strength=strength, label=label), STEPS.astype(np.float32))


def test_splitting_leaves_a_thin_vessel_its_contrast():
    """Total variation alone takes a fifth of it."""
    label = np.zeros((40, 24, 24), dtype=np.float32)
    label[4:36, 4:20, 4:20] = 1
    label[2:38, 11:13, 11:13] = 2
    clean = np.where(label == 2, 300.0, np.where(label == 1, 100.0, -50.0))
    image = (clean + np.random.default_rng(0).normal(0, 30, label.shape)).astype(np.float32)
    structure, grain = split_noise(image, label)
    np.testing.assert_allclose(structure + grain, image, atol=1e-3)
    for index, true in ((1, 100), (2, 300)):
        assert structure[label == index].mean() == pytest.approx(true, abs=4)
    assert np.abs(structure - clean)[label > 0].mean() < 0.5 * np.abs(image - clean)[label > 0].mean()


@pytest.mark.parametrize("sigma_voxels", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.6, 0.5, 0.4)])
def test_noise_of_a_gaussian_spectrum_is_as_strong_as_asked(sigma_voxels):
    spectrum = gaussian_spectrum(25.0, sigma_voxels)
    twice = np.r_[1, np.full(spectrum.shape[2] - 1, 2)]  # what `rfftn` leaves out
    sd = np.sqrt((spectrum * twice).sum() / 17**3)
    drawn = sd * draw_grain(grain_kernel(spectrum), noise_for(LARGE))
    assert noise_sd(drawn, np.ones(LARGE, int)) == pytest.approx(25, rel=0.08)


def test_noise_of_a_gaussian_spectrum_is_correlated_as_blurred_white_noise():
    """The autocorrelation of a Gaussian of deviation s is one of deviation s sqrt(2)."""
    drawn = draw_grain(grain_kernel(gaussian_spectrum(10.0, (0.9, 0.9, 1.2))), noise_for(LARGE))
    for axis, sigma in enumerate((0.9, 0.9, 1.2)):
        first, second = (np.take(drawn, range(k, LARGE[axis] - 1 + k), axis).ravel() for k in (0, 1))
        assert np.corrcoef(first, second)[0, 1] == pytest.approx(np.exp(-1 / (4 * sigma**2)), abs=0.03)
