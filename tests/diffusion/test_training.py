"""Batches made into problems for the engines, and what is measured of them before training."""

import math

import pytest
import torch
from custom.diffusion.context import MODES, Context
from custom.diffusion.moments import MIN_SIGMA, REGIONS, ResidualMoments
from custom.diffusion.network import StructDiffUNet
from custom.diffusion.training import MeasureResidual, PrepareRendering, PrepareResidualDiffusion, residual_sigma
from custom.volumes.haar import haar_unpack
from ignite.engine import Engine

CPU = torch.device("cpu")
BACKGROUND = REGIONS.index("soft_background")
G = math.sqrt(math.pi / 2)  # deviation of a Gaussian over its mean absolute value


def batch_of(bands, *, mode="template", spread_hu=100.0):
    """A batch whose residual, in units of 100 HU, has the given packed bands (B, 8, h, w, d), all in the background."""
    residual = haar_unpack(bands)
    context = torch.zeros(len(residual), len(Context._fields), *residual.shape[2:])
    context[:, 4], context[:, 5] = spread_hu, 100.0
    if mode == "mask_only":
        context[:, 2] = -1
    prior = torch.full_like(residual, 40.0)
    return {"image": prior + 100 * residual, "prior": prior, "context": context}


def moments():
    return ResidualMoments(2, 2, image_unit=5.0)


def bands(*levels, batch=1):
    return torch.tensor(levels).view(1, 8, 1, 1, 1).expand(batch, -1, 2, 2, 2)


def test_measured_deviation_of_a_handmade_residual():
    """Two batches of opposite signs: mean sizes 2, 1/2, ... by band; the unit of the low-pass band is 0.4."""
    levels = torch.tensor([3.0, 0.5, 1, 2, 3, 4, 5, 0])
    low = torch.tensor([1.0, *levels[1:]])
    batches = [batch_of(bands(*levels.tolist()), spread_hu=40.0), batch_of(bands(*(-low).tolist()), spread_hu=40.0)]
    sigma = residual_sigma(batches, moments(), CPU)
    assert sigma.shape == (len(MODES), len(REGIONS), 8)
    assert sigma.dtype == torch.float32
    expected = G * torch.tensor([2.0 / 0.4, *levels[1:]])
    expected[7] = MIN_SIGMA
    torch.testing.assert_close(sigma[0, BACKGROUND], expected, rtol=1e-4, atol=0)
    sigma[0, BACKGROUND] = 1
    assert torch.equal(sigma, torch.ones_like(sigma))  # no voxel fell there


def test_measured_deviation_of_gaussian_residuals_is_theirs_in_every_mode():
    generator = torch.Generator().manual_seed(0)
    true = torch.linspace(0.3, 2, 8).view(1, 8, 1, 1, 1)
    draws = [factor * true * torch.randn(2, 8, 8, 8, 8, generator=generator) for factor in (1.0, 3.0)]
    batches = [batch_of(draws[0]), batch_of(draws[1], mode="mask_only")]
    sigma = residual_sigma(batches, moments(), CPU)
    for mode, factor in ((0, 1.0), (1, 3.0)):
        torch.testing.assert_close(sigma[mode, BACKGROUND], factor * true.flatten(), rtol=0.08, atol=0)


def test_a_volume_of_odd_size_is_measured_too():
    batch = {key: value[..., :3, :, :] for key, value in batch_of(bands(*[1.0] * 8)).items()}
    sigma = residual_sigma([batch], moments(), CPU)
    assert sigma[0, BACKGROUND].isfinite().all()
    assert (sigma[0, BACKGROUND] != 1).any()


def make_network():
    return StructDiffUNet(num_labels=2, channels=(8, 8), condition_channels=4)


def measuring(loader, batches):
    network, shadow, engine = make_network(), make_network(), Engine(lambda engine, batch: None)
    MeasureResidual(network, shadow, loader, batches=batches, device=CPU).attach(engine)
    return network, shadow, engine


def test_network_and_shadow_are_measured_over_so_many_batches_and_the_loader_begins_anew():
    """Of three batches from a loader of two, the first counts twice: (1 + 4 + 1) / 3."""
    network, shadow, engine = measuring([batch_of(bands(*[1.0] * 8)), batch_of(bands(*[4.0] * 8))], 3)
    engine.run([0], max_epochs=1)
    for part in (network, shadow):
        torch.testing.assert_close(part.moments.table[0, BACKGROUND], torch.full((8,), 2 * G))
        assert part.moments.measured


def test_a_resumed_run_keeps_the_table_it_loaded():
    network, _, engine = measuring([batch_of(bands(*[1.0] * 8))], 1)
    network.moments.set_table(torch.full_like(network.moments.table, 7.0))
    engine.load_state_dict({"epoch_length": 1, "max_epochs": 3, "iteration": 1})
    engine.run([0])
    assert (network.moments.table == 7).all()


def test_a_training_batch_is_the_noisy_residual_and_its_velocity_at_times_of_its_own():
    network, batch = make_network(), batch_of(torch.randn(4, 8, 2, 2, 2))
    batch["label"] = torch.ones(4, 1, 4, 4, 4)
    torch.manual_seed(3)
    x, target, (timesteps, context), options = PrepareResidualDiffusion(network)(batch, CPU)
    torch.manual_seed(3)
    noise = torch.randn(4, 1, 4, 4, 4)
    alpha = network.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    assert len(set(timesteps.tolist())) > 1
    torch.testing.assert_close(target["residual"], (batch["image"] - 40.0) / 100)
    torch.testing.assert_close(x, alpha.sqrt() * target["residual"] + (1 - alpha).sqrt() * noise)
    torch.testing.assert_close(target["velocity"], alpha.sqrt() * noise - (1 - alpha).sqrt() * target["residual"])
    assert torch.equal(context, batch["context"])
    assert torch.equal(target["label"], batch["label"])
    assert options == {"with_moments": True}


@pytest.mark.parametrize("known", [True, False])
def test_a_rendering_batch_has_its_case_names_and_the_truth_where_there_is_one(known):
    batch = batch_of(torch.randn(2, 8, 2, 2, 2)) | {"label": torch.ones(2, 1, 4, 4, 4), "case": ("a", "b")}
    if not known:
        del batch["image"]
    context, truth, args, options = PrepareRendering()(batch, CPU)
    assert torch.equal(context, batch["context"])
    assert truth.shape == (2, 2 if known else 1, 4, 4, 4)
    assert torch.equal(truth[:, -1:], batch["label"])
    assert (args, options) == ((), {"cases": ["a", "b"]})
