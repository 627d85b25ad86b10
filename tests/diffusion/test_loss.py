"""The training loss against hand-computed values and finite differences."""

import math

import pytest
import torch
from custom.diffusion.context import Context
from custom.diffusion.correspondence import two_way_consistency
from custom.diffusion.formulas import amplitudes, precondition
from custom.diffusion.loss import StructDiffLoss, moments_loss
from custom.diffusion.moments import REGIONS, from_local
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.training import TrackResidual
from custom.volumes.grids import pad_to_multiple
from custom.volumes.haar import haar_pack, haar_unpack
from ignite.engine import Engine
from monai.utils import CommonKeys as Keys
from torch.nn import functional as F

G = math.sqrt(math.pi / 2)  # deviation of a Gaussian over its mean absolute value


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_network(sigma=None, correspondence_channels=0):
    """Unmeasured, or with one standard deviation everywhere (where the context is blank)."""
    torch.manual_seed(0)
    network = StructDiffUNet(
        num_labels=3, channels=(8, 8), condition_channels=4, correspondence_channels=correspondence_channels
    ).eval()
    if sigma is not None:
        network.moments.set_table(torch.full_like(network.moments.table, sigma))
    return network


def blank_context(size, batch=1):
    """Background only, everything at 0 HU, and spreads of 100 HU: the residual unit is 1 everywhere."""
    context = torch.zeros(batch, len(Context._fields), *size)
    context[:, 4:] = 100.0
    return context


def make_target(size, batch=1, residual=0.0):
    return {
        "velocity": noise(batch, 1, *size, seed=1),
        "residual": torch.full((batch, 1, *size), residual),
        "timesteps": torch.tensor([300, 700])[:batch],
        "context": blank_context(size, batch),
        "label": torch.zeros(batch, 1, *size),
        "image": torch.zeros(batch, 1, *size),
    }


def loss_of(network, velocity, target, **options):
    """Loss of a velocity beside the moments that the network hands on for the context."""
    prediction = network(torch.zeros_like(velocity), target["timesteps"], target["context"], with_moments=True)
    return StructDiffLoss(**options)(prediction._replace(velocity=velocity), target)


# Likelihood of the moments


def test_moments_loss_by_hand():
    """Two voxels of sigma 1 and 2, so 1.5 on average."""
    error, sigma = (torch.tensor(values).view(1, 1, 1, 1, 2) for values in ([1.0, -3.0], [1.0, 2.0]))
    expected = [1 / (2 * 1 * 1.5) + G, 9 / (2 * 2 * 1.5) + G * 3 / 2 + math.log(2)]
    torch.testing.assert_close(moments_loss(error, sigma).flatten(), torch.tensor(expected))


def test_gradient_of_the_mean_is_the_error_over_sigma_and_its_level_in_the_sample():
    error, sigma = noise(2, 8, 3, 2, 4).requires_grad_(), 0.2 + noise(2, 8, 3, 2, 4, seed=1).abs()
    sigma[1] *= 10
    moments_loss(error, sigma).sum().backward()
    level = torch.stack([part.mean() for part in sigma]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(error.grad, error.detach() / (sigma * level))


def test_gradient_of_sigma_vanishes_at_the_deviation_by_absolute_error_and_points_there():
    error = 3 * noise(1, 8, 4, 4, 4)
    deviation = G * error.abs().mean()

    def slope(factor):
        sigma = (factor * deviation).requires_grad_()
        moments_loss(error, sigma.expand_as(error)).mean().backward()
        return float(sigma.grad)

    assert abs(slope(1.0)) < 1e-5
    assert slope(0.9) < -0.01
    assert slope(1.1) > 0.01
    torch.testing.assert_close(deviation, error.square().mean().sqrt(), rtol=0.05, atol=0)  # as for Gaussian data


def test_sigma_learns_each_deviation_and_the_mean_its_value():
    """Gradient descent on both ends at the moments of two Gaussian populations (sampling error of 400: 4 %)."""
    draws = torch.stack([2 + 0.5 * noise(400), -1 + 3.0 * noise(400, seed=1)]).view(1, 2, 400, 1, 1)
    mean, log_sigma = (torch.zeros(1, 2, 1, 1, 1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([mean, log_sigma], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        moments_loss(draws - mean, log_sigma.exp().expand_as(draws)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(mean, draws.mean(2, keepdim=True), rtol=0, atol=0.01)
    torch.testing.assert_close(log_sigma.exp(), draws.std(2, keepdim=True), rtol=0.05, atol=0)


# The whole loss


def test_unmeasured_network_is_charged_the_squared_velocity_error_and_the_residual():
    """Mean 0 and sigma 1: c_out = 1, and half the square and the size of the residual, which come in bands."""
    target, velocity = make_target((8, 6, 10), batch=2), noise(2, 1, 8, 6, 10)
    target["residual"] = noise(2, 1, 8, 6, 10, seed=2)
    residual = haar_pack(target["residual"])
    expected = F.mse_loss(velocity, target["velocity"]) + (residual.square() / 2 + G * residual.abs()).mean()
    torch.testing.assert_close(loss_of(make_network(), velocity, target), expected)


def test_thin_weight_without_thin_voxels_changes_nothing():
    target, velocity = make_target((8, 6, 10), residual=0.5), noise(1, 1, 8, 6, 10)
    plain = loss_of(make_network(0.4), velocity, target)
    weighted = loss_of(make_network(0.4), velocity, target, thin_labels=[2], thin_weight=10.0)
    torch.testing.assert_close(weighted, plain)


def test_velocity_error_is_measured_in_units_of_its_spread_and_the_residual_of_its_own():
    """Errors of c_out cost 1; a residual of sigma in every band costs 1/2 for the mean and G + log sigma for sigma."""
    network, target = make_network(0.3), make_target((8, 6, 10), batch=2)
    target["residual"] = haar_unpack(torch.full((2, 8, 4, 3, 5), -0.3))
    a, s = amplitudes(network.alphas_cumprod, target["timesteps"], 5)
    c_out = precondition(a, s, torch.tensor(0.3))[2]
    assert c_out[0] / c_out[1] > 1.5  # the two times differ
    loss = loss_of(network, target["velocity"] + c_out, target)
    torch.testing.assert_close(loss, torch.tensor(1 + 1 / 2 + G + math.log(0.3)))


def test_errors_at_label_edges_are_measured_voxel_by_voxel():
    """As above, with c_out and sigma of its own region in every local channel."""
    network, target = make_network(), make_target((8, 8, 8))
    table = 0.1 + noise(*network.moments.table.shape, seed=2).abs()
    network.moments.set_table(table)
    target["context"][:, 0, :, :, 3:] = 1  # blocks of column 1 hold the face
    condition = network.encode(target["context"])
    assert condition.edge.sum() == 16
    a, s = amplitudes(network.alphas_cumprod, target["timesteps"], 5)
    c_out = precondition(a, s, condition.sigma)[2]
    target["residual"] = haar_unpack(from_local(condition.sigma, condition.edge))
    error = haar_unpack(from_local(c_out, condition.edge))
    loss = loss_of(network, target["velocity"] + error, target)
    sigma = condition.sigma
    expected = 1 + 1 / 2 + G + sigma.log().mean()
    torch.testing.assert_close(loss, expected)


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
    loss = StructDiffLoss(thin_labels=[3, 5], thin_weight=7.0)
    assert loss.weights(label).tolist() == [[[[[7.0]]]]]


def test_weighted_loss_by_hand():
    """Six blocks in a row, a thin voxel in the first: weights 10, 1, 1, 1, 1, 1; velocity 2, 3, ..., residual 4, 5, ...

    An unmeasured network charges the residual c by c^2 / 2 + G |c|, and c is sqrt(8) c in one band of eight.
    """
    target, error = make_target((2, 2, 12), residual=5.0), torch.full((1, 1, 2, 2, 12), 3.0)
    target["label"][0, 0, 0, 0, 0] = 9
    error[..., :2] = 2.0
    target["residual"][..., :2] = 4.0
    loss = loss_of(make_network(), target["velocity"] + error, target, thin_labels=[9], thin_weight=10.0)
    expected = (10 * (4 + 16 / 2 + G * 4 / 8**0.5) + 5 * (9 + 25 / 2 + G * 5 / 8**0.5)) / 15
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_gradient_is_the_finite_difference():
    """The loss is quadratic in the velocity, so central differences are exact for any step."""
    target = make_target((8, 8, 8))
    target["label"][0, 0, 0, 0, 0] = 9
    target["context"][:, 0, 3:] = 1
    network, velocity = make_network(0.5), noise(1, 1, 8, 8, 8).requires_grad_()
    loss_of(network, velocity, target, thin_labels=[9]).backward()
    for voxel in ((0, 0, 0), (1, 2, 3), (7, 7, 7)):
        step = torch.zeros(1, 1, 8, 8, 8)
        step[(0, 0, *voxel)] = 0.5
        with torch.no_grad():
            ahead, behind = (loss_of(network, velocity + way * step, target, thin_labels=[9]) for way in (1, -1))
            difference = ahead - behind
        torch.testing.assert_close(velocity.grad[(0, 0, *voxel)], difference, rtol=1e-3, atol=1e-5)


def test_scaling_of_the_velocity_error_does_not_train_sigma():
    """c_out comes from sigma without its gradient: the likelihood alone says what sigma is."""
    network, target = make_network(0.5), make_target((8, 8, 8), residual=0.5)
    gradients = []
    for error in (0.0, 10.0):
        network.zero_grad()
        loss_of(network, target["velocity"] + error, target).backward()
        gradients.append(network.moments.hidden[-1].bias.grad.clone())
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("size", [(7, 5, 6), (9, 3, 11)])
def test_odd_sizes_are_padded_to_even_ones_and_no_further(size):
    """The network pads to multiples of 4; the loss must not look beyond the even volume."""
    target, velocity = make_target(size), noise(1, 1, *size)
    target["residual"] = noise(1, 1, *size, seed=2)
    error, residual = (pad_to_multiple(part, 2) for part in (velocity - target["velocity"], target["residual"]))
    loss = loss_of(make_network(), velocity, target, thin_labels=[9])
    residual = haar_pack(residual)
    torch.testing.assert_close(loss, error.square().mean() + (residual.square() / 2 + G * residual.abs()).mean())


@pytest.mark.parametrize("correspondence_channels", [0, 8])
def test_gradients_reach_every_parameter(correspondence_channels):
    network = make_network(0.5, correspondence_channels).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
    target = make_target((16, 16, 16), batch=2)
    target["context"][:, [0, 2]] = noise(2, 2, 16, 16, 16, seed=3).round().clamp(0, 2)
    target["context"][:, [1, 3]] = 300 * noise(2, 2, 16, 16, 16, seed=4)
    target["image"], target["residual"] = 300 * noise(2, 1, 16, 16, 16, seed=5), noise(2, 1, 16, 16, 16, seed=6)
    x = noise(2, 1, 16, 16, 16, seed=7)
    StructDiffLoss()(network(x, target["timesteps"], target["context"], with_moments=True), target).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in network.parameters())


# The table follows while training


def track(network, target):
    """One iteration of a trainer, as the handler sees it."""
    prediction = network(target["residual"], target["timesteps"], target["context"], with_moments=True)
    engine = Engine(lambda engine, batch: None)
    engine.state.output = {Keys.PRED: prediction, Keys.LABEL: target}
    TrackResidual(network)(engine)


def test_training_tracks_the_table_by_the_residual_in_units_of_sigma():
    network, target = make_network(0.5).train(), make_target((8, 8, 8), residual=0.5)
    track(network, target)
    table = network.moments.table[0, REGIONS.index("soft_background")]
    # A constant residual of one sigma is sqrt(8) sigma in the low-pass band, 0 in the others.
    torch.testing.assert_close(table[0], torch.tensor(0.5 * (0.98 + 0.02 * G * 8**0.5)))
    torch.testing.assert_close(table[1:], torch.full((7,), 0.5 * 0.98))


def test_an_unmeasured_network_does_not_move_its_table():
    network = make_network().train()
    before = network.moments.table.clone()
    track(network, make_target((8, 8, 8), residual=1.0))
    assert torch.equal(network.moments.table, before)
    assert not network.moments.measured


def test_the_loss_does_not_move_the_table():
    network = make_network(0.5).train()
    before, target = network.moments.table.clone(), make_target((8, 8, 8), residual=1.0)
    loss_of(network, target["velocity"], target)
    assert torch.equal(network.moments.table, before)


@pytest.mark.parametrize("thin_weight", [0.99, 0.0, -3.0])
def test_thin_weight_below_one_is_refused(thin_weight):
    with pytest.raises(ValueError, match=f"thin_weight: must be at least 1, got {thin_weight}"):
        StructDiffLoss(thin_weight=thin_weight)


def test_correspondence_term_is_added_with_its_weight_and_trains_the_attention():
    size = (15, 16, 9)
    network, target = make_network(correspondence_channels=8), make_target(size)
    target["context"][:, [0, 2]] = noise(1, 2, *size, seed=4).round().clamp(0, 2)
    target["image"], velocity = 300 * noise(1, 1, *size, seed=5), noise(1, 1, *size)
    without = loss_of(network, velocity, target, correspondence_weight=0.0)
    channels, image = (pad_to_multiple(target[key], 8) for key in ("context", "image"))
    context = Context.of(channels)
    consistency = two_way_consistency(network.correspondence.affinity(context), context.template_image_hu, image)
    total = loss_of(network, velocity, target, correspondence_weight=0.3)
    assert consistency > 0.01
    torch.testing.assert_close(total, without + 0.3 * consistency)
    total.backward()
    assert all(p.grad.any() for p in network.correspondence.mask_encoder.parameters())


def test_the_loss_has_no_parameters_and_needs_no_network():
    assert list(StructDiffLoss().parameters()) == []
