"""The template prior against numpy, hand-computed tables and synthetic grain of known strength."""

import numpy as np
import pytest
import torch
from custom.diffusion.prior import complete_statistics, fill_holes, paint_prior, template_background
from custom.volumes.intensity import label_statistics, noise_sd, split_noise, surrogate_grain
from scipy import ndimage

SHAPE = (40, 36, 33)


def white(sd, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(0, sd, shape).astype(np.float32)


def box(shape=SHAPE, margin=4, value=1):
    label = np.zeros(shape, np.int64)
    label[margin:-margin, margin:-margin, margin:-margin] = value
    return label


def lag_one(volume):
    return [
        np.corrcoef(np.take(volume, range(1, n), axis).ravel(), np.take(volume, range(n - 1), axis).ravel())[0, 1]
        for axis, n in enumerate(volume.shape)
    ]


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


def test_filling_keeps_valid_voxels_and_continues_a_constant():
    image = torch.full((1, 1, 13, 10, 11), 5.0)
    valid = torch.ones_like(image, dtype=torch.bool)
    valid[..., 3:9, 2:8, 2:9] = False
    image[~valid] = 1e4
    filled = fill_holes(image, valid)
    torch.testing.assert_close(filled, torch.full_like(image, 5.0))


def test_filling_is_close_to_a_linear_ramp():
    """10 HU a voxel across a hole of eight: the filling follows it to 2.5 voxels and is monotonic."""
    ramp = 10 * torch.arange(32.0).view(1, 1, 32, 1, 1).expand(1, 1, 32, 16, 16)
    valid = torch.ones_like(ramp, dtype=torch.bool)
    valid[..., 12:20, 4:12, 4:12] = False
    filled = fill_holes(torch.where(valid, ramp, -1000.0), valid)
    assert torch.equal(filled[valid], ramp[valid])
    assert (filled - ramp).abs().max() < 25
    assert (filled[0, 0, 11:21, 8, 8].diff() > 0).all()


def test_filling_stays_within_the_range_of_its_surroundings():
    image = torch.from_numpy(white(100, (15, 12, 9)))[None, None]
    valid = torch.from_numpy(box((15, 12, 9), 3) == 0)[None, None]
    filled = fill_holes(torch.where(valid, image, 1e6), valid)
    assert filled.min() >= image[valid].min()
    assert filled.max() <= image[valid].max()


def test_filling_one_valid_voxel_spreads_it_and_none_changes_nothing():
    image = torch.from_numpy(white(1, (6, 5, 7)))[None, None]
    valid = torch.zeros_like(image, dtype=torch.bool)
    assert torch.equal(fill_holes(image, valid), image)
    assert torch.equal(fill_holes(image, ~valid), image)
    valid[0, 0, 2, 3, 4] = True
    torch.testing.assert_close(fill_holes(image, valid), image[0, 0, 2, 3, 4].expand_as(image))


def test_background_does_not_show_the_heart():
    label = torch.from_numpy(box(margin=10))[None, None]
    halo = torch.nn.functional.max_pool3d((label > 0).float(), 3, 1, 1)  # partial volume, one voxel around
    image = -60 + 460 * halo
    background = template_background(image, label)
    # up to the border: blurring must not mix in zeros from beyond it
    torch.testing.assert_close(background, torch.full_like(background, -60.0), rtol=0, atol=0.01)


def test_the_heart_is_replaced_by_soft_tissue_not_by_lung_or_unlabelled_blood_beside_it():
    label = torch.from_numpy(box(margin=8))[None, None]
    image = torch.full(label.shape, -60.0)
    image[:, :, : label.shape[2] // 2 - 2] = -800.0
    image[..., -4:] = 400.0
    inside = torch.nn.functional.max_pool3d(-(label > 0).float(), 3, 1, 1) == -1
    background = template_background(torch.where(label > 0, 300.0, image), label)
    assert float(background[inside].max()) < 0
    assert float(background[inside].median()) == pytest.approx(-60.0, abs=30)
    assert float(background[:, :, 2].median()) == pytest.approx(-800.0, abs=1)  # lung itself stays


def test_prior_paints_exactly_the_table_on_the_labels_and_the_background_elsewhere():
    label = torch.randint(-1, 4, (2, 1, 5, 6, 7), generator=torch.Generator().manual_seed(0)).float()
    table = torch.tensor([[9999.0, 9999.0], [105.3, 21.0], [400.1, 30.5], [-7.0, 2.0]])
    background = torch.from_numpy(white(50, (2, 1, 5, 6, 7)))
    prior, sd = paint_prior(label, table, background, 12.5)
    for index in (1, 2, 3):
        assert (prior[label == index] == table[index, 0]).all()
        assert (sd[label == index] == table[index, 1]).all()
    outside = label <= 0
    assert torch.equal(prior[outside], background[outside])
    assert (sd[outside] == 12.5).all()


def test_missing_labels_follow_the_shift_of_the_present_ones():
    """Shifts of the present labels: +10, +30, +100, median +30; sds 20, 30, 90, median 30."""
    nan = float("nan")
    table = torch.tensor([[-80.0, 40.0], [110.0, 20.0], [nan, nan], [430.0, 90.0], [500.0, 30.0]])
    completed, absent = complete_statistics(table, [-60, 100, 370, 400, 400])
    assert absent == [2]
    assert completed[2].tolist() == [400.0, 30.0]
    present = [0, 1, 3, 4]
    assert torch.equal(completed[present], table[present])
    assert table[2].isnan().all()  # the argument is left alone


def test_background_does_not_shift_missing_labels():
    nan = float("nan")
    table = torch.tensor([[-800.0, 500.0], [nan, nan], [nan, nan]])
    completed, absent = complete_statistics(table, [-60, 100, 370])
    assert absent == [1, 2]
    assert completed.tolist() == [[-800.0, 500.0], [100.0, 0.0], [370.0, 0.0]]


def test_nominal_table_of_another_length_is_refused():
    with pytest.raises(ValueError, match="nominal_hu: one value for each of the 3 labels is needed, got 2"):
        complete_statistics(torch.zeros(3, 2), [1.0, 2.0])


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


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_surrogate_keeps_spread_and_lag_one_correlation(blur):
    grain = white(1.0, (48, 44, 41))
    grain = ndimage.gaussian_filter(grain, blur) if blur else grain
    grain *= 25 / grain.std()
    label = box((48, 44, 41), 6)
    surrogate = surrogate_grain(grain, label)
    assert surrogate.shape == grain.shape
    assert surrogate.dtype == np.float32
    assert surrogate.std() == pytest.approx(grain[label > 0].std(), rel=1e-3)
    np.testing.assert_allclose(lag_one(surrogate), lag_one(grain), atol=0.05)


def test_surrogate_is_new_grain_fixed_by_its_seed():
    grain, label = white(25.0), box()
    surrogate = surrogate_grain(grain, label, seed=3)
    assert np.array_equal(surrogate, surrogate_grain(grain, label, seed=3))
    for other in (grain, surrogate_grain(grain, label, seed=4)):
        assert abs(np.corrcoef(surrogate.ravel(), other.ravel())[0, 1]) < 0.03


def test_surrogate_ignores_what_lies_outside_the_labels():
    grain, label = white(25.0), box()
    spoilt = np.where(label > 0, grain, 1000.0).astype(np.float32)
    assert np.array_equal(surrogate_grain(grain, label), surrogate_grain(spoilt, label))


@pytest.mark.parametrize("label", [np.zeros(SHAPE, int), box()], ids=["no labels", "constant"])
def test_surrogate_of_nothing_is_zero(label):
    assert not surrogate_grain(np.zeros(SHAPE, np.float32), label).any()
