"""The training loss against hand-computed values and finite differences."""

import pytest
import torch
from torch.nn import functional as F

from custom.correspondence import CorrespondenceAttention
from custom.diffusion import haar_pack, haar_unpack, pad_to_multiple
from custom.losses import StructDiffLoss


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_target(size, batch=1, scale=None):
    packed = [(n + n % 2) // 2 for n in size]
    return {
        "velocity": noise(batch, 1, *size, seed=1),
        "output_scale": torch.ones(batch, 8, *packed) if scale is None else scale,
        "label": torch.zeros(batch, 1, *size),
    }


def test_unit_scale_without_thin_labels_is_the_mean_squared_error():
    target = make_target((8, 6, 10), batch=2)
    velocity = noise(2, 1, 8, 6, 10)
    torch.testing.assert_close(StructDiffLoss()(velocity, target), F.mse_loss(velocity, target["velocity"]))


def test_thin_weight_without_thin_voxels_changes_nothing():
    target = make_target((8, 6, 10))
    velocity = noise(1, 1, 8, 6, 10)
    loss = StructDiffLoss(thin_labels=[9], thin_weight=10.0)(velocity, target)
    torch.testing.assert_close(loss, F.mse_loss(velocity, target["velocity"]))


def test_error_is_measured_in_units_of_the_scale():
    """An error of exactly c_out in every band costs one."""
    scale = 0.1 + noise(2, 8, 4, 3, 5, seed=2).abs()
    target = make_target((8, 6, 10), batch=2, scale=scale)
    torch.testing.assert_close(StructDiffLoss()(target["velocity"] + haar_unpack(scale), target), torch.tensor(1.0))


def test_weights_around_one_thin_voxel():
    """Voxel (5, 4, 7): packed blocks 2 and 3, 1 and 2, 3 and 4 have a voxel within one step of it."""
    label = torch.zeros(1, 1, 12, 12, 12)
    label[0, 0, 5, 4, 7] = 9
    label[0, 0, 0, 0, 0] = 8  # not thin
    expected = torch.ones(1, 1, 6, 6, 6)
    expected[0, 0, 2:4, 1:3, 3:5] = 10
    assert torch.equal(StructDiffLoss(thin_labels=[9], thin_weight=10.0).weights(label), expected)


@pytest.mark.parametrize(("voxel", "block"), [((0, 0, 0), (0, 0, 0)), ((11, 11, 11), (5, 5, 5))])
def test_weights_at_the_border(voxel, block):
    label = torch.zeros(1, 1, 12, 12, 12)
    label[(0, 0, *voxel)] = 9
    weights = StructDiffLoss(thin_labels=[9], thin_weight=4.0).weights(label)
    assert (weights > 1).nonzero().tolist() == [[0, 0, *block]]
    assert weights.max() == 4


def test_two_thin_labels_in_one_block_weigh_once():
    label = torch.tensor([3.0, 5, 3, 3, 5, 5, 3, 0]).reshape(1, 1, 2, 2, 2)
    assert StructDiffLoss(thin_labels=[3, 5], thin_weight=7.0).weights(label).tolist() == [[[[[7.0]]]]]


def test_weighted_loss_by_hand():
    """Six blocks in a row, a thin voxel in the first: weights 10, 1, 1, 1, 1, 1, errors 2, 3, 3, 3, 3, 3."""
    target = make_target((2, 2, 12))
    target["label"][0, 0, 0, 0, 0] = 9
    error = torch.full((1, 1, 2, 2, 12), 3.0)
    error[..., :2] = 2.0
    loss = StructDiffLoss(thin_labels=[9], thin_weight=10.0)(target["velocity"] + error, target)
    torch.testing.assert_close(loss, torch.tensor((10 * 4.0 + 5 * 9.0) / 15))


def test_gradient_is_the_finite_difference():
    """The loss is quadratic, so central differences are exact for any step."""
    scale = 0.5 + noise(1, 8, 2, 2, 2, seed=2).abs()
    target = make_target((4, 4, 4), scale=scale)
    target["label"][0, 0, 0, 0, 0] = 9
    loss = StructDiffLoss(thin_labels=[9])
    velocity = noise(1, 1, 4, 4, 4).requires_grad_()
    loss(velocity, target).backward()
    for voxel in ((0, 0, 0), (1, 2, 3), (3, 3, 3)):
        step = torch.zeros(1, 1, 4, 4, 4)
        step[(0, 0, *voxel)] = 0.5
        with torch.no_grad():
            difference = loss(velocity + step, target) - loss(velocity - step, target)
        torch.testing.assert_close(velocity.grad[(0, 0, *voxel)], difference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 5, 6), (9, 3, 11)])
def test_odd_sizes_read_the_matching_corner_of_a_padded_scale(size):
    """`output_scale` comes on a grid padded to the network's multiple; the loss must not look beyond the volume."""
    packed = [(n + 1) // 2 for n in size]
    scale = torch.full((1, 8, 8, 8, 8), 1e-6)
    inside = (..., *(slice(n) for n in packed))
    scale[inside] = 0.5 + noise(1, 8, *packed, seed=2).abs()
    target = make_target(size, scale=scale)
    velocity = noise(1, 1, *size)
    expected = (haar_pack(pad_to_multiple(velocity - target["velocity"], 2)) / scale[inside]).square().mean()
    torch.testing.assert_close(StructDiffLoss(thin_labels=[9])(velocity, target), expected)


@pytest.mark.parametrize("thin_weight", [0.99, 0.0, -3.0])
def test_thin_weight_below_one_is_refused(thin_weight):
    with pytest.raises(ValueError, match=f"thin_weight: must be at least 1, got {thin_weight}"):
        StructDiffLoss(thin_weight=thin_weight)


def test_correspondence_term_is_added_with_its_weight_and_trains_the_attention():
    torch.manual_seed(0)
    attention = CorrespondenceAttention(3, 8)
    size = (15, 16, 9)
    target = make_target(size)
    target["context"] = noise(1, 5, *size, seed=4).round().clamp(0, 2)
    target["image"] = 300 * noise(1, 1, *size, seed=5)
    velocity = noise(1, 1, *size)
    plain = StructDiffLoss()(velocity, target)
    loss = StructDiffLoss(correspondence=attention, correspondence_weight=0.3)
    consistency = attention.consistency(pad_to_multiple(target["context"], 8), pad_to_multiple(target["image"], 8))
    total = loss(velocity, target)
    torch.testing.assert_close(total, plain + 0.3 * consistency)
    total.backward()
    assert all(p.grad.any() for p in attention.mask_encoder.parameters())


def test_the_attention_stays_with_the_network():
    assert list(StructDiffLoss(correspondence=CorrespondenceAttention(3, 8)).parameters()) == []
