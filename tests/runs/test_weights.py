"""Weights written when they are worth it, and averaged, in real ignite engines."""

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from custom.runs.weights import KeepBest, KeepLast, LoadWeights, WeightAverage, load_pretrained, save_atomically


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
    with pytest.raises(FileNotFoundError, match="no weights; train first"):
        LoadWeights(network, str(tmp_path / "none.pt"))()


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
