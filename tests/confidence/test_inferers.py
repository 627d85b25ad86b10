"""Structure and variance of one rendering: the image is that of the plain inferer, the variance by hand."""

import pytest
import torch
from custom.confidence.inferers import PredictedVarianceInferer, SkipSamplingInferer
from custom.confidence.variance import predicted_variance
from custom.diffusion.context import RESIDUAL_UNIT_HU, Context
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.schedule import spaced_timesteps
from custom.volumes.grids import crop_to

SIZE = (12, 10, 8)
CASES = ["a", "b"]


def make_network(unet_scale):
    """Moments of its own in every place; a U-Net that says nothing at a scale of 0."""
    torch.manual_seed(0)
    network = StructDiffUNet(num_labels=3, channels=(8, 8), condition_channels=4).eval()
    torch.nn.init.normal_(network.regressor.out[-1].conv.weight, 0, 0.1)
    torch.nn.init.normal_(network.unet.out[-1].conv.weight, 0, unet_scale)
    return network


@pytest.fixture(scope="module")
def network():
    return make_network(0.1)


@pytest.fixture(scope="module")
def context():
    generator = torch.Generator().manual_seed(0)
    images = 100 * torch.randn(2, len(Context._fields), *SIZE, generator=generator)
    images[:, [0, 2]] = torch.randint(0, 3, (2, 2, *SIZE), generator=generator).float()
    return images


def render(context, network, times, **options):
    return StructDiffInferer(times, **options)(context, network, CASES)


# Predicted variance


@pytest.mark.parametrize("options", [{}, {"sample_strength": 0.0}, {"roi_size": [8, 8, 8]}], ids=str)
def test_the_image_is_that_of_the_plain_inferer(network, context, options):
    result = PredictedVarianceInferer(3, **options)(context, network, CASES)
    assert result.shape == (2, 2, *SIZE)
    assert torch.equal(result[:, :1], render(context, network, 3, **options))


def test_near_the_mean_the_variance_is_the_predicted_one_and_far_away_a_ninth_of_the_distance(network, context):
    with torch.no_grad():
        *_, sigma = network.encode(context)
    expected = render(context, network, 3, sample_strength=0.0)
    predicted = RESIDUAL_UNIT_HU**2 * crop_to(predicted_variance(sigma), SIZE)
    at_mean = PredictedVarianceInferer(3, sample_strength=0.0)(context, network, CASES)[:, 1:]
    torch.testing.assert_close(at_mean, predicted, rtol=1e-4, atol=1e-2)
    planted = expected.clone()
    planted[0, 0, 3, 4, 5] += 900
    planted[1, 0, 0, 0, 0] -= 2.9 * predicted[1, 0, 0, 0, 0].sqrt()
    variance = PredictedVarianceInferer(3).variance(planted, context, network)
    predicted[0, 0, 3, 4, 5] = 300**2
    torch.testing.assert_close(variance, predicted, rtol=1e-4, atol=1e-2)


# Skip sampling


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_the_image_is_that_of_the_longest_schedule_and_the_variance_that_of_full_samples(network, context, strength):
    inferer = SkipSamplingInferer(strides=(4, 1, 2), sample_strength=strength, seed=5)
    result = inferer(context, network, CASES)
    assert torch.equal(result[:, :1], render(context, network, 4, sample_strength=strength, seed=5))
    samples = torch.stack([render(context, network, spaced_timesteps(calls), seed=5) for calls in (1, 2, 4)])
    torch.testing.assert_close(result[:, 1:], samples.var(0, unbiased=True), rtol=1e-3, atol=1e-3)
    assert result[:, 1:].mean() > 0.01
    assert inferer.sample_strength == strength


def test_on_a_straight_path_schedules_agree(context):
    """Where the U-Net says nothing, any schedule draws mean + sigma noise."""
    result = SkipSamplingInferer(strides=(1, 3))(context, make_network(0.0), CASES)
    assert result[:, 1:].max() < 1e-4


def test_schedules_begin_alike_and_cost_their_calls(network, context):
    inferer, times = SkipSamplingInferer(strides=(3, 1, 2)), []
    assert {schedule[0] for schedule in inferer.schedules} == {999}
    hook = network.unet.register_forward_pre_hook(lambda module, inputs: times.append(int(inputs[1][0])))
    inferer(context, network, CASES)
    hook.remove()
    assert times == [t for calls in (1, 2, 3) for t in spaced_timesteps(calls)]


def test_a_failed_rendering_leaves_the_strength_as_it_was(network, context):
    inferer = SkipSamplingInferer(strides=(1, 2), sample_strength=0.5)
    with pytest.raises(ValueError, match="cases: one name for each of the 2 samples"):
        inferer(context, network, ["a"])
    assert inferer.sample_strength == 0.5


@pytest.mark.parametrize("strides", [(4,), (4, 4), (4, 6, 4), ()])
def test_fewer_than_two_different_schedules_are_refused(strides):
    with pytest.raises(ValueError, match="strides: two or more different numbers of network calls are needed, got"):
        SkipSamplingInferer(strides=strides)
