"""The template prior against hand-computed tables and volumes."""

import numpy as np
import pytest
import torch
from custom.diffusion.prior import (
    bed_vessels,
    complete_statistics,
    fill_holes,
    own_template,
    paint_prior,
    template_background,
    with_label_means,
)
from scipy import ndimage

SHAPE = (40, 36, 33)


def white(sd, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(0, sd, shape).astype(np.float32)


def box(shape=SHAPE, margin=4, value=1):
    label = np.zeros(shape, np.int64)
    label[margin:-margin, margin:-margin, margin:-margin] = value
    return label


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
    torch.testing.assert_close(background, torch.full_like(background, -60.0), rtol=0, atol=0.01)


def test_outside_the_heart_the_background_is_the_template_itself():
    label = torch.from_numpy(box(margin=10))[None, None]
    image = torch.from_numpy(white(300.0))[None, None]
    outside = torch.nn.functional.max_pool3d((label > 0).float(), 3, 1, 1) == 0
    background = template_background(image, label)
    assert torch.equal(background[outside], image[outside])
    assert not torch.equal(background[~outside], image[~outside])


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


def test_prior_paints_exactly_the_means_on_the_labels_and_the_background_elsewhere():
    label = torch.randint(-1, 4, (2, 1, 5, 6, 7), generator=torch.Generator().manual_seed(0)).float()
    means = torch.tensor([9999.0, 105.3, 400.1, -7.0])
    background = torch.from_numpy(white(50, (2, 1, 5, 6, 7)))
    prior = paint_prior(label, means, background)
    for index in (1, 2, 3):
        assert (prior[label == index] == means[index]).all()
    outside = label <= 0
    assert torch.equal(prior[outside], background[outside])


def test_labels_are_shifted_to_the_means_of_the_prior_one_by_one():
    label = torch.zeros(2, 1, 8, 8, 8)
    label[:, :, :4], label[1, :, 5, 5, :7] = 1, 2  # the other has seven voxels, too few for a mean
    prior = torch.where(label > 0, 300 * label, -60.0)
    texture = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 20
    image = prior + texture + 40 * label
    shifted, large = with_label_means(image, label, prior), label == 1
    assert torch.equal(shifted[~large], image[~large])
    for sample, of_it, told in zip(shifted, large, texture, strict=True):
        torch.testing.assert_close(sample[of_it], 300 + told[of_it] - told[of_it].mean(), rtol=0, atol=1e-3)
    untold = torch.full_like(prior, -60.0)  # as without a prior, for comparison
    assert torch.equal(with_label_means(image, label, untold), image)


def test_a_drawing_becomes_its_own_template_with_even_labels_of_the_means_that_were_drawn():
    label = torch.zeros(2, 1, 12, 12, 12)
    label[:, :, :4], label[1, :, 8, 8, :7] = 1, 2  # seven voxels are too few for a mean
    drawn = torch.where(label > 0, 300 * label, -60.0)
    drawn += torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0)) * 20
    prior = own_template(drawn, label, torch.full_like(drawn, 77.0))
    for sample, image, at in zip(prior, drawn, label, strict=True):
        torch.testing.assert_close(sample[at == 1], image[at == 1].mean().expand_as(sample[at == 1]))
    assert (prior[label == 2] == 77).all()
    away = torch.nn.functional.max_pool3d((label > 0).float(), 3, 1, 1) == 0
    assert torch.equal(prior[away], drawn[away])


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


def test_vessels_that_come_to_lie_in_the_lung_of_a_template_get_a_bed_of_soft_tissue():
    image, nothing = torch.full((1, 1, 24, 20, 20), -850.0), torch.zeros(1, 1, 24, 20, 20)
    image[:, :, :8] = -80
    target = nothing.clone()
    target[:, :, 12, 10, :] = 3
    bedded = bed_vessels(image, nothing, target, [3], [1.5] * 3)
    away = torch.tensor(ndimage.distance_transform_edt(target[0, 0] == 0, sampling=1.5))[None, None]
    assert (bedded[away <= 2] == -80).all()
    assert torch.equal(bedded[away >= 4], image[away >= 4])
    between = bedded[(away > 2) & (away < 4) & (image < -300)]
    assert -850 < between.min()
    assert between.max() < -80
    assert torch.equal(bed_vessels(image, nothing, target, [], [1.5] * 3), image)
    covered = torch.ones_like(nothing)  # what a template labels is not its lung
    assert torch.equal(bed_vessels(image, covered, target, [3], [1.5] * 3), image)
