"""The training loss against hand-computed values and finite differences."""

import math

import pytest
import torch
from custom.diffusion.context import Context
from custom.diffusion.loss import StructDiffLoss, label_edges, moments_loss
from custom.diffusion.network import Prediction, StructDiffUNet
from custom.volumes.haar import haar_pack


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_prediction(grid, batch=1, *, sigma=1.0, residual=None, velocity_error=None):
    """Mean 0 and one deviation; with a velocity that is off by so much, or the moments alone."""
    shape = (batch, 8, *grid)
    error = torch.zeros(shape) if residual is None else haar_pack(residual)
    moments = error, torch.full(shape, sigma)
    if velocity_error is None:
        return Prediction(*moments)
    wanted = noise(*shape, seed=1)
    return Prediction(*moments, wanted + velocity_error, wanted)


def make_target(size, batch=1):
    return {"label": torch.zeros(batch, 1, *size)}


def of_moments(residual, sigma=1.0):
    """What `moments_loss` charges for packed residuals at a mean of 0 and one deviation everywhere."""
    return residual.square() / sigma**2 + math.log(sigma)


# Loss of the moments


def test_moments_loss_by_hand():
    """Two voxels of sigma 1 and 2, so 1.5 on average."""
    error, sigma = (torch.tensor(values).view(1, 1, 1, 1, 2) for values in ([1.0, -3.0], [1.0, 2.0]))
    expected = [1 / (2 * 1 * 1.5) + 1 / 2, 9 / (2 * 2 * 1.5) + 9 / 8 + math.log(2)]
    torch.testing.assert_close(moments_loss(error, sigma).flatten(), torch.tensor(expected))


def test_gradient_of_the_mean_is_the_error_over_sigma_and_its_level_in_the_sample():
    error, sigma = noise(2, 8, 3, 2, 4).requires_grad_(), 0.2 + noise(2, 8, 3, 2, 4, seed=1).abs()
    sigma[1] *= 10
    moments_loss(error, sigma).sum().backward()
    level = torch.stack([part.mean() for part in sigma]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(error.grad, error.detach() / (sigma * level))


def test_gradient_of_sigma_vanishes_at_the_root_mean_square_error_and_points_there():
    error = 3 * noise(1, 8, 4, 4, 4)
    deviation = error.square().mean().sqrt()

    def slope(factor):
        sigma = (factor * deviation).requires_grad_()
        moments_loss(error, sigma.expand_as(error)).mean().backward()
        return float(sigma.grad)

    assert abs(slope(1.0)) < 1e-5
    assert slope(0.9) < -0.01
    assert slope(1.1) > 0.01


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


# Edges and weights


def test_label_edges_of_a_cube():
    """Voxels 4 to 11, blocks 2 to 5; its face neighbours, voxels 3 and 12, make blocks 1 and 6 edge too."""
    label = torch.zeros(1, 1, 16, 16, 24)
    label[..., 4:12, 4:12, 4:12] = 1
    edge = label_edges(label)
    assert edge.shape == (1, 1, 8, 8, 12)
    assert edge.dtype == torch.bool
    grown, core = torch.zeros(2, 8, 8, 12, dtype=torch.bool)
    grown[1:7, 1:7, 1:7], core[3:5, 3:5, 3:5] = True, True
    assert torch.equal(edge[0, 0], grown & ~core)


@pytest.mark.parametrize("face", [4, 5])
def test_a_face_on_a_block_border_makes_both_blocks_edge_and_one_inside_a_block_only_that(face):
    label = torch.ones(1, 1, 10, 2, 2)
    label[:, :, face:] = 2
    expected = [False, True, True, False, False] if face == 4 else [False, False, True, False, False]
    assert label_edges(label)[0, 0, :, 0, 0].tolist() == expected


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_edges_are_found_along_every_axis(axis):
    label = torch.zeros(1, 1, 8, 8, 8)
    label.narrow(axis, 0, 3).fill_(1)  # the face lies inside the second block
    assert label_edges(label).nonzero()[:, axis].unique().tolist() == [1]


@pytest.mark.parametrize("value", [-1.0, 0.0, 3.0])
def test_one_label_everywhere_has_no_edges(value):
    assert not label_edges(torch.full((1, 1, 4, 6, 8), value)).any()


def test_weights_around_one_thin_voxel():
    """Voxel (5, 4, 7): packed blocks 2 and 3, 1 and 2, 3 and 4 have a voxel within one step of it."""
    label = torch.zeros(1, 1, 12, 12, 12)
    label[0, 0, 5, 4, 7] = 9
    expected = torch.ones(1, 1, 6, 6, 6)
    expected[0, 0, 2:4, 1:3, 3:5] = 10
    assert torch.equal(StructDiffLoss(thin_labels=[9], thin_weight=10.0).weights(label), expected)


def test_weights_at_a_face_between_other_labels_are_those_of_edges():
    """Voxels 0 to 3, blocks 0 and 1, against the rest: the blocks on both sides of the face."""
    label = torch.ones(1, 1, 12, 4, 4)
    label[:, :, 4:] = 2
    weights = StructDiffLoss(thin_labels=[9], edge_weight=3.0).weights(label)
    assert weights[0, 0, :, 0, 0].tolist() == [1, 3, 3, 1, 1, 1]
    assert (weights == weights[..., :1, :1]).all()


@pytest.mark.parametrize(("thin", "edge"), [(10.0, 4.0), (2.0, 4.0)])
def test_a_thin_label_weighs_as_such_and_never_less_than_an_edge(thin, edge):
    label = torch.zeros(1, 1, 16, 4, 4)
    label[:, :, :2], label[:, :, 12] = 9, 1
    weights = StructDiffLoss(thin_labels=[9], thin_weight=thin, edge_weight=edge).weights(label)
    assert weights[0, 0, :, 0, 0].tolist() == [max(thin, edge)] * 2 + [1, 1, 1, edge, edge, 1][:4] + [edge, 1]


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


@pytest.mark.parametrize("weight", [0.99, 0.0, -3.0])
@pytest.mark.parametrize("name", ["thin_weight", "edge_weight"])
def test_a_weight_below_one_is_refused(name, weight):
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, got {weight}"):
        StructDiffLoss(**{name: weight})


# The whole loss


def test_loss_is_the_squared_velocity_error_and_that_of_the_moments():
    residual, error = noise(2, 1, 8, 6, 10, seed=2), noise(2, 8, 4, 3, 5)
    expected = error.square().mean() + of_moments(haar_pack(residual), 0.4).mean()
    prediction = make_prediction((4, 3, 5), 2, sigma=0.4, residual=residual, velocity_error=error)
    torch.testing.assert_close(StructDiffLoss()(prediction, make_target((8, 6, 10), 2)), expected)


def test_without_a_velocity_the_moments_alone_are_charged():
    residual = noise(1, 1, 8, 6, 10, seed=2)
    loss = StructDiffLoss()(make_prediction((4, 3, 5), residual=residual), make_target((8, 6, 10)))
    torch.testing.assert_close(loss, of_moments(haar_pack(residual)).mean())


def test_weighted_loss_by_hand():
    """Six blocks in a row, a thin voxel in the first and a face between the fourth and the fifth: weights 10, 1, 1, 4,
    4, 1; velocity errors 2, 3, 3, 5, 5, 3, residuals 4, 7, 7, 6, 6, 7.

    A residual c costs c^2 at sigma 1; c is sqrt(8) c in one band of eight, so c^2 on average.
    """
    target, residual, error = (
        make_target((2, 2, 12)),
        torch.full((1, 1, 2, 2, 12), 7.0),
        torch.full((1, 8, 1, 1, 6), 3.0),
    )
    target["label"][0, 0, 0, 0, 0] = 9
    target["label"][..., 8:] = 1
    error[..., 0], error[..., 3:5] = 2.0, 5.0
    residual[..., :2], residual[..., 6:10] = 4.0, 6.0
    loss = StructDiffLoss(thin_labels=[9], thin_weight=10.0, edge_weight=4.0)
    expected = (10 * (4 + 16) + 3 * (9 + 49) + 8 * (25 + 36)) / 21
    prediction = make_prediction((1, 1, 6), residual=residual, velocity_error=error)
    torch.testing.assert_close(loss(prediction, target), torch.tensor(expected))


def test_weights_without_thin_voxels_and_edges_change_nothing():
    target = make_target((8, 6, 10))
    prediction = make_prediction((4, 3, 5), residual=noise(1, 1, 8, 6, 10), velocity_error=1.0)
    plain = StructDiffLoss(thin_weight=1.0, edge_weight=1.0)(prediction, target)
    torch.testing.assert_close(StructDiffLoss(thin_labels=[2])(prediction, target), plain)


@pytest.mark.parametrize("size", [(7, 5, 6), (9, 3, 11)])
def test_odd_sizes_are_padded_to_even_ones_and_no_further(size):
    """The network pads to multiples of 4; the loss must not look beyond the even volume."""
    grid = tuple(-(-n // 4) * 2 for n in size)
    blocks = (..., *(slice((n + 1) // 2) for n in size))
    velocity_error, error = torch.full((2, 1, 8, *grid), 1e6)
    inside = noise(2, 1, 8, *((n + 1) // 2 for n in size))
    velocity_error[blocks], error[blocks] = inside
    prediction = make_prediction(grid, velocity_error=velocity_error)._replace(error=error)
    expected = inside[0].square().mean() + of_moments(inside[1]).mean()
    loss = StructDiffLoss(thin_labels=[9])(prediction, make_target(size))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_gradient_is_the_finite_difference():
    """The loss is quadratic in the velocity, so central differences are exact for any step."""
    target, loss = make_target((8, 8, 8)), StructDiffLoss(thin_labels=[9])
    target["label"][0, 0, 0, 0, 0] = 9
    target["label"][:, 0, 3:] = 1
    plain = make_prediction((4, 4, 4), sigma=0.5, velocity_error=noise(1, 8, 4, 4, 4))
    velocity = plain.velocity.clone().requires_grad_()
    loss(plain._replace(velocity=velocity), target).backward()
    for entry in ((0, 0, 0, 0), (3, 1, 2, 3), (7, 3, 3, 3)):
        step = torch.zeros(1, 8, 4, 4, 4)
        step[(0, *entry)] = 0.5
        ahead, behind = (loss(plain._replace(velocity=plain.velocity + way * step), target) for way in (1, -1))
        torch.testing.assert_close(velocity.grad[(0, *entry)], ahead - behind, rtol=1e-2, atol=1e-5)


# With the network


def make_network(seed=0):
    torch.manual_seed(seed)
    network = StructDiffUNet(num_labels=3, channels=(8, 8), condition_channels=4).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
    return network


def predict(network, target):
    size = target["label"].shape[2:]
    labels = noise(2, 2, *size, seed=3).round().clamp(0, 2)
    images = 300 * noise(2, 2, *size, seed=4)
    context = Context(labels[:, :1], images[:, :1], labels[:, 1:], images[:, 1:]).stacked()
    target["label"] = context[:, :1]
    return network(noise(2, 1, *size, seed=7), torch.tensor([300, 700]), context, noise(2, 1, *size, seed=6))


def test_gradients_reach_every_parameter():
    network, target = make_network(), make_target((16, 16, 16), 2)
    StructDiffLoss()(predict(network, target), target).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_the_loss_of_the_diffusion_does_not_train_the_moments():
    """A wrong velocity must not make the regressor give up: mean and sigma get the gradient of their own loss alone."""
    gradients = []
    for wrong in (0.0, 100.0):
        network, target = make_network(), make_target((8, 8, 8), 2)
        prediction = predict(network, target)
        StructDiffLoss()(prediction._replace(velocity=prediction.velocity + wrong), target).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    names = [name for name in gradients[0] if name.startswith(("regressor.", "point_spread."))]
    assert len(names) > 20
    for name in names:
        assert torch.equal(gradients[0][name], gradients[1][name]), name
    assert not torch.equal(gradients[0]["unet.out.2.conv.weight"], gradients[1]["unet.out.2.conv.weight"])


def test_moments_alone_are_trained_without_the_unet():
    network, target = make_network(), make_target((8, 8, 8), 2)
    network.moments_only = True
    StructDiffLoss()(predict(network, target), target).backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in network.named_parameters() if not name.startswith("unet.")}


def test_a_few_steps_lower_the_loss():
    network, target, loss = make_network(), make_target((8, 8, 8), 2), StructDiffLoss()
    optimizer, values = torch.optim.Adam(network.parameters(), lr=2e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        values.append(loss(predict(network, target), target))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]


def test_the_loss_has_no_parameters_and_needs_no_network():
    assert list(StructDiffLoss().parameters()) == []
