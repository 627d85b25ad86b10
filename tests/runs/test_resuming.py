"""Handlers in real ignite engines: seeds, measuring, averaging, saving and resuming."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.networks.schedulers import DDPMScheduler
from monai.transforms import Compose, RandScaleIntensity

from custom.diffusion.moments import MIN_SIGMA, MODES, REGIONS, ResidualMoments
from custom.diffusion.network import CONTEXT_CHANNELS, StructDiffUNet
from custom.diffusion.training import MeasureResidual, PrepareResidualDiffusion, residual_sigma
from custom.runs.resuming import Resume, SeedEachEpoch
from custom.runs.weights import KeepBest, WeightAverage, save_atomically
from custom.volumes.haar import haar_unpack

CPU = torch.device("cpu")
BACKGROUND = REGIONS.index("soft_background")
G = math.sqrt(math.pi / 2)  # deviation of a Gaussian over its mean absolute value


# Seeds


class Draws:
    """Records one draw of every source of randomness in each epoch of an engine."""

    def __init__(self, **options):
        self.rows = []
        self.transforms = Compose([RandScaleIntensity(factors=0.9, prob=1.0)])
        self.engine = Engine(lambda engine, batch: self.rows.append(self.draw()))
        SeedEachEpoch(5, self.transforms, **options).attach(self.engine)

    def draw(self):
        return (
            float(self.transforms(torch.ones(1, 2, 2, 2))[0, 0, 0, 0]),
            float(torch.rand(())),
            float(np.random.rand()),
            random.random(),
        )

    def run(self, epochs, start=0):
        torch.manual_seed(start)
        np.random.seed(start)
        random.seed(start)
        if start:
            self.engine.load_state_dict({"epoch_length": 1, "max_epochs": epochs, "iteration": start})
            self.engine.run([0])
        else:
            self.engine.run([0], max_epochs=epochs)
        return self.rows


def test_every_epoch_has_draws_of_its_own_which_a_resumed_run_repeats():
    whole = Draws().run(4)
    assert all(len(set(column)) == 4 for column in zip(*whole, strict=True))
    assert Draws().run(4, start=2) == whole[2:]


def test_validation_repeats_its_draws_and_leaves_the_generators_of_training_alone():
    rows = Draws(vary=False, global_random=False).run(3)
    assert len({row[0] for row in rows}) == 1
    assert len({row[1:] for row in rows}) == 3
    torch.manual_seed(0)
    assert rows[0][1] == float(torch.rand(()))


def test_another_seed_gives_other_draws():
    draws = []
    for seed in (5, 6):
        transforms = Compose([RandScaleIntensity(factors=0.9, prob=1.0)])
        SeedEachEpoch(seed, transforms)(Engine(lambda engine, batch: None))
        draws.append((float(transforms(torch.ones(1, 1, 1, 1))), float(torch.rand(()))))
    assert draws[0][0] != draws[1][0]
    assert draws[0][1] != draws[1][1]


# Measuring


def prepare():
    return PrepareResidualDiffusion(DDPMScheduler(10), residual_scale_hu=100.0)


def batch_of(bands, *, mode="template", spread_hu=100.0):
    """A batch whose residual, in units of 100 HU, has the given packed bands (B, 8, h, w, d), all in the background."""
    residual = haar_unpack(bands)
    context = torch.zeros(len(residual), len(CONTEXT_CHANNELS), *residual.shape[2:])
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
    sigma = residual_sigma(batches, prepare(), moments(), CPU)
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
    sigma = residual_sigma(batches, prepare(), moments(), CPU)
    for mode, factor in ((0, 1.0), (1, 3.0)):
        torch.testing.assert_close(sigma[mode, BACKGROUND], factor * true.flatten(), rtol=0.08, atol=0)


def test_a_volume_of_odd_size_is_measured_too():
    batch = {key: value[..., :3, :, :] for key, value in batch_of(bands(*[1.0] * 8)).items()}
    sigma = residual_sigma([batch], prepare(), moments(), CPU)
    assert sigma[0, BACKGROUND].isfinite().all()
    assert (sigma[0, BACKGROUND] != 1).any()


def make_network():
    return StructDiffUNet(num_labels=2, channels=(8, 8), condition_channels=4)


def measuring(loader, batches):
    network, shadow, engine = make_network(), make_network(), Engine(lambda engine, batch: None)
    MeasureResidual(network, shadow, loader, prepare(), batches=batches, device=CPU).attach(engine)
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


# Saving


def test_saving_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "deep/model.pt"
    for content in ({"a": 1}, {"a": 2}):
        save_atomically(content, path)
    assert torch.load(path) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_the_old_file_and_no_part_of_the_new(tmp_path, monkeypatch, existing):
    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.pt"
    if existing:
        save_atomically({"a": 1}, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_atomically({"a": 2}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"] * existing
    if existing:
        assert torch.load(path) == {"a": 1}


class Validation:
    """An evaluator that scores a model whose only weight is the number of the validation."""

    def __init__(self, path):
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.keep = KeepBest(self.model, str(path))
        self.engine = Engine(lambda engine, batch: None)
        self.keep.attach(self.engine)
        self.engine.add_event_handler(Events.STARTED, self.score)
        self.number = 0

    def score(self, engine):
        engine.state.key_metric_name, engine.state.metrics = "score", {"score": self.value}

    def run(self, *scores):
        for self.value in scores:
            self.number += 1
            torch.nn.init.constant_(self.model.weight, self.number)
            self.engine.run([0], max_epochs=1)


def weight_in(path):
    return float(torch.load(path, weights_only=True)["weight"])


def test_the_best_validation_is_kept(tmp_path):
    path = tmp_path / "models/model.pt"
    validation = Validation(path)
    validation.run(float("nan"))
    assert not path.exists()
    for scores, best in (((-3.0,), 2), ((-1.0,), 3), ((-2.0, float("nan"), -1.0), 3), ((-0.5,), 7)):
        validation.run(*scores)
        assert weight_in(path) == best


def test_a_resumed_run_knows_the_best_score_so_far(tmp_path):
    first = Validation(tmp_path / "model.pt")
    first.run(-5.0, -2.0)
    again = Validation(tmp_path / "model.pt")
    again.keep.load_state_dict(first.keep.state_dict())
    again.run(-3.0)
    assert weight_in(tmp_path / "model.pt") == 2
    again.run(-3.0, -1.0)
    assert weight_in(tmp_path / "model.pt") == 3


# Resuming and averaging


class Run:
    """Three iterations an epoch of a trainer whose every weight is a history of its draws."""

    def __init__(self, path, options=None):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ema = WeightAverage(self.model, momentum=0.002)
        self.trainer = Engine(self.step)
        objects = {"network": self.model, "ema": self.ema.ema_model, "optimizer": self.optimizer}
        Resume(objects, str(path), CPU, options=options).attach(self.trainer)
        SeedEachEpoch(0, Compose([])).attach(self.trainer)
        self.ema.attach(self.trainer)
        self.epochs = []
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.epochs.append(engine.state.epoch))

    def step(self, engine, batch):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 3)).square().mean().backward()
        self.optimizer.step()

    def weights(self):
        return [*self.model.parameters(), *self.ema.ema_model.parameters()]


def test_a_killed_run_resumes_to_the_same_weights_and_average(tmp_path):
    whole = Run(tmp_path / "whole.pt")
    whole.trainer.run(range(3), max_epochs=4)

    broken = Run(tmp_path / "broken.pt")

    def kill(engine):
        raise KeyboardInterrupt

    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), kill)  # amid epoch 3
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.run(range(3), max_epochs=4)
    assert [p.name for p in tmp_path.iterdir() if "broken" in p.name] == ["broken.pt"]
    resumed = Run(tmp_path / "broken.pt")
    resumed.trainer.run(range(3), max_epochs=4)
    assert resumed.epochs == [3, 4]
    for mine, theirs in zip(resumed.weights(), whole.weights(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(whole.weights()[0], whole.weights()[2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "interrupted run cannot be continued"),
        (lambda path: torch.save({"network": {}}, path), "interrupted run cannot be continued"),
        (lambda path: None, "is of an interrupted run with rate 0.1, now 0.2"),
    ],
    ids=["cut short", "of another network", "of other options"],
)
def test_a_checkpoint_of_something_else_is_refused_with_file_and_remedy(tmp_path, spoil, message):
    path = tmp_path / "run.pt"
    Run(path, options={"rate": 0.1}).trainer.run(range(3), max_epochs=1)
    spoil(path)
    with pytest.raises(ValueError, match=message) as caught:
        Run(path, options={"rate": 0.2}).trainer.run(range(3), max_epochs=2)
    assert str(path) in str(caught.value)
    assert "delete the file or set another output_dir" in str(caught.value)


def test_a_finished_run_started_again_trains_no_more(tmp_path):
    first = Run(tmp_path / "run.pt")
    first.trainer.run(range(3), max_epochs=2)
    again = Run(tmp_path / "run.pt")
    again.trainer.run(range(3), max_epochs=2)
    assert again.epochs == []
    for mine, theirs in zip(again.weights(), first.weights(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("start", "momentum"), [(0, 0.002), (90, 0.002), (0, 0.5)])
def test_average_is_the_recursion_with_a_momentum_of_the_iteration_alone(start, momentum):
    """w = iteration; mean += m (w - mean) with m = max(momentum, 10 / (10 + iteration))."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, float(start))
    average = WeightAverage(model, momentum=momentum)
    engine = Engine(lambda engine, batch: torch.nn.init.constant_(model.weight, float(engine.state.iteration)))
    average.attach(engine)
    engine.load_state_dict({"epoch_length": 30, "max_epochs": 5, "iteration": start})
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.terminate())
    engine.run([0] * 30)
    assert engine.state.iteration == start + 30
    expected = float(start)
    for iteration in range(start + 1, start + 31):
        expected += max(momentum, 10 / (10 + iteration)) * (iteration - expected)
    assert float(average.ema_model.weight) == pytest.approx(expected, rel=1e-5)
