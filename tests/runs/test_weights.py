"""Weights written when they are worth it, and averaged, in real ignite engines."""

from pathlib import Path

import pytest
import torch
from custom.runs.files import part_of
from custom.runs.weights import (
    ClipGradients,
    KeepBest,
    KeepLast,
    LoadWeights,
    RefuseDivergence,
    WeightAverage,
    load_pretrained,
    save_atomically,
)
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents


def test_saving_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "deep/model.pt"
    for content in ({"a": 1}, {"a": 2}):
        save_atomically(content, path)
    assert torch.load(path) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_the_old_file_and_no_part_of_the_new(tmp_path, monkeypatch, existing):
    def full(content, path):
        path.write(b"half")
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


class OnAGpu(torch.nn.Linear):
    """Its weight can only be brought to the CPU, as a file has to hold it."""

    def state_dict(self, *args, **options):
        class Weight:
            def cpu(self):
                return torch.tensor(7.0)

        return {"weight": Weight()}


@pytest.mark.parametrize("keep", [KeepBest, KeepLast])
def test_weights_of_a_gpu_are_kept_for_machines_without_one(tmp_path, keep):
    engine = Engine(lambda engine, batch: None)
    engine.state.key_metric_name, engine.state.metrics = "score", {"score": 1.0}
    keep(OnAGpu(1, 1), str(tmp_path / "model.pt"))(engine)
    assert weight_in(tmp_path / "model.pt") == 7


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


def test_pretrained_weights_are_optional_but_must_fit(tmp_path):
    network, path = torch.nn.Linear(2, 2), tmp_path / "pretrained.pt"
    before = network.weight.clone()
    assert load_pretrained(network, str(path)) is False
    torch.testing.assert_close(network.weight, before)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    assert load_pretrained(network, str(path)) is True
    assert not torch.equal(network.weight, before)
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(ValueError, match="these are not weights of the configured network"):
        load_pretrained(network, str(path))
    torch.save(None, path)
    with pytest.raises(ValueError, match=r"configured network \(it holds no weights by name\); use the"):
        load_pretrained(network, str(path))
    with pytest.raises(FileNotFoundError, match="no weights; train first"):
        LoadWeights(network, str(tmp_path / "none.pt"))()


class OfOtherVersion(torch.nn.Linear):
    """A network that knows whose weights it is given."""

    def load_state_dict(self, state_dict, *args, **options):
        raise ValueError("of another version; train anew")


@pytest.mark.parametrize(
    "content", [b"X\x01\x00\x00\x00\xff.", b"", b"garbage"], ids=["text that is none", "empty", "garbage"]
)
def test_a_file_that_is_no_file_of_torch_is_told_from_weights_that_the_network_refuses(tmp_path, content):
    network, path = OfOtherVersion(2, 2), tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"model.pt: of another version; train anew$"):
        LoadWeights(network, str(path))()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pt: these are not weights of the configured network .*; use the"):
        LoadWeights(network, str(path))()


def test_the_last_weights_are_kept_but_not_those_of_a_training_that_failed(tmp_path):
    path, network = tmp_path / "models/model.pt", torch.nn.Linear(1, 1, bias=False)

    def step(engine, fails):
        torch.nn.init.constant_(network.weight, 3.0)
        if fails:
            raise KeyboardInterrupt

    def run(*, fails):
        engine = Engine(step)
        KeepLast(network, str(path)).attach(engine)
        engine.run([fails])

    with pytest.raises(KeyboardInterrupt):
        run(fails=True)
    assert not path.exists()
    run(fails=False)
    assert float(torch.load(path, weights_only=True)["weight"]) == 3


@pytest.mark.parametrize(("scores", "kept"), [((), 9), ((float("nan"),), 9), ((float("nan"), 0.5), 2)])
def test_a_training_without_a_score_leaves_its_last_weights_and_else_its_best(tmp_path, scores, kept):
    path = tmp_path / "model.pt"
    validation = Validation(path)
    validation.run(*scores)
    trainer = Engine(lambda engine, batch: torch.nn.init.constant_(validation.model.weight, 9.0))
    KeepLast(validation.model, str(path), keep_best=validation.keep).attach(trainer)
    trainer.run([0])
    assert weight_in(path) == kept


def diverging(tmp_path, loss, weight):
    """A trainer whose second iteration gives this loss and weight, and which keeps the weights of every epoch."""
    network, path = torch.nn.Linear(1, 1, bias=False), tmp_path / "model.pt"

    def step(engine, batch):
        second = engine.state.iteration == 2
        engine.state.output = {"loss": torch.tensor(loss if second else 1.0)}
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        torch.nn.init.constant_(network.weight, weight if second else 1.0)
        return engine.state.output

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    RefuseDivergence(network, learning_rate=4.0, output_dir=str(tmp_path / "out")).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: save_atomically(network.state_dict(), path))
    return engine, path


@pytest.mark.parametrize(
    ("loss", "weight", "what"),
    [
        (float("nan"), 2.0, "the loss is nan in epoch 2, iteration 2"),
        (float("inf"), 2.0, "the loss is inf in epoch 2, iteration 2"),
        (1.0, float("nan"), "weights are NaN or infinite in epoch 2, iteration 2"),
    ],
)
def test_divergence_is_an_error_that_names_the_rate_and_spares_the_weights(tmp_path, loss, weight, what):
    engine, path = diverging(tmp_path, loss, weight)
    with pytest.raises(
        ValueError, match=f"learning_rate 4.0: the training diverged, {what}; lower it, and set another"
    ):
        engine.run([0], max_epochs=3)
    assert weight_in(path) == 1


@pytest.mark.parametrize(("max_norm", "factor"), [(1.0, 0.2), (5.0, 1.0), (50.0, 1.0)])
def test_gradients_longer_than_the_norm_are_scaled_down_to_it_before_the_step(max_norm, factor):
    """Gradients 3 and 4 of two layers, together of norm 5; a third layer has none."""
    layers = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(3))
    steps = []

    def step(engine, batch):
        (3 * layers[0].weight - 4 * layers[1].weight).sum().backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        steps.extend(None if layer.weight.grad is None else float(layer.weight.grad) for layer in layers)

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    ClipGradients(layers, max_norm=max_norm).attach(engine)
    engine.run([0], max_epochs=1)
    assert steps == [pytest.approx(3 * factor, rel=1e-4), pytest.approx(-4 * factor, rel=1e-4), None]


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = torch.nn.Linear(2, 2)
    torch.save({key: value * float("nan") for key, value in network.state_dict().items()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: these weights are NaN or infinite.*train anew, or use others"):
        LoadWeights(network, str(tmp_path / "model.pt"))()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_full_disk_is_named_with_the_file_of_the_weights(tmp_path, size):
    path = tmp_path / "resume.pt"
    save_atomically({"a": 1}, path)
    part_of(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="nothing was written, make room") as caught:
        save_atomically({"a": torch.zeros(size)}, path)
    assert caught.value.filename == str(path)
    assert torch.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["resume.pt"]
