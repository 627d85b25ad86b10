"""Runs that go on after an interruption, in real ignite engines: seeds, saving and resuming."""

import random

import numpy as np
import pytest
import torch
from custom.runs.resuming import Resume, SeedEachEpoch
from custom.runs.weights import WeightAverage
from ignite.engine import Engine, Events
from monai.transforms import Compose, RandScaleIntensity

CPU = torch.device("cpu")


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


# Resuming


class Run:
    """Three iterations an epoch of a trainer whose every weight is a history of its draws."""

    def __init__(self, path, options=None, **more):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ema = WeightAverage(self.model, momentum=0.002)
        self.trainer = Engine(self.step)
        objects = {"network": self.model, "ema": self.ema.ema_model, "optimizer": self.optimizer}
        Resume(objects, str(path), CPU, options=options, **more).attach(self.trainer)
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


def test_a_run_that_forgets_leaves_no_state_but_an_interrupted_one_does(tmp_path):
    path = tmp_path / "resume.pt"

    finished = Engine(lambda *_: None)
    Resume({}, str(path), torch.device("cpu"), forget_when_done=True).attach(finished)
    finished.run([0], max_epochs=2)
    assert not path.exists()

    def killed_in_epoch_2(engine, _):
        if engine.state.epoch == 2:
            raise RuntimeError("killed")

    engine = Engine(killed_in_epoch_2)
    Resume({}, str(path), torch.device("cpu"), forget_when_done=True).attach(engine)
    with pytest.raises(RuntimeError, match="killed"):
        engine.run([0], max_epochs=3)
    assert path.exists()


RESOLVED = {"seed": 0, "batch_size": 2, "anatomy": {"1": {"class_weight": 2.0}}, "output_dir": "a", "train::x": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"batch_size": 4, "seed": 1}, "batch_size 2, now 4, seed 0, now 1"),
        ({"anatomy": {"1": {"class_weight": 3.0}}}, "anatomy#1#class_weight 2.0, now 3.0"),
        ({"warmup_epochs": 3}, "warmup_epochs not set, now 3"),
    ],
)
def test_every_option_is_compared_and_those_that_differ_are_named_alone(tmp_path, change, words):
    path = tmp_path / "run.pt"
    Run(path, resolved=RESOLVED).trainer.run(range(3), max_epochs=1)
    with pytest.raises(ValueError, match=rf"run.pt: is of an interrupted run with {words}; repeat that run's options"):
        Run(path, resolved=RESOLVED | change).trainer.run(range(3), max_epochs=2)


def test_places_and_what_is_left_out_may_change(tmp_path):
    path = tmp_path / "run.pt"
    Run(path, resolved=RESOLVED).trainer.run(range(3), max_epochs=1)
    moved = RESOLVED | {"output_dir": "b", "num_workers": 3, "train::x": 2, "pretrained": "c", "files": None}
    again = Run(path, resolved=moved, leave_out=["pretrained"])
    again.trainer.run(range(3), max_epochs=2)
    assert again.epochs == [2]


def test_a_nested_override_is_named_and_places_in_it_may_change(tmp_path, monkeypatch):
    path, config = tmp_path / "run.pt", tmp_path / "train.json"
    config.write_text('{"seed": 0, "optimizer": {"weight_decay": 0.01}, "loader": {"num_workers": 0}}')
    command = ["monai/bundle/__main__.py", "run", "training", "--config_file", str(config)]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*command, *more])
        return Run(path, resolved={"seed": 0})

    run().trainer.run(range(3), max_epochs=1)
    with pytest.raises(ValueError, match="interrupted run with optimizer#weight_decay 0.01, now 0.1; repeat"):
        run("--optimizer#weight_decay", "0.1").trainer.run(range(3), max_epochs=2)
    preset = tmp_path / "preset.json"
    preset.write_text('{"optimizer": {"weight_decay": 0.1}}')
    with pytest.raises(ValueError, match="interrupted run with optimizer#weight_decay 0.01, now 0.1; repeat"):
        run("--config_file", f"['{config}','{preset}']").trainer.run(range(3), max_epochs=2)
    run("--loader#num_workers=4").trainer.run(range(3), max_epochs=2)
    monkeypatch.setattr("sys.argv", ["pytest"])  # whose configs are not known
    again = Run(path, resolved={"seed": 0})
    again.trainer.run(range(3), max_epochs=3)
    assert again.epochs == [3]


def test_cases_are_compared_by_what_their_files_hold(tmp_path):
    path, names = tmp_path / "run.pt", ("a", "b")
    for folder in ("first", "moved"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(name.encode())

    def run(folder, weight=1.0):
        cases = [{"image": str(tmp_path / folder / name), "case": name, "weight": weight} for name in names]
        return Run(path, data={"training": cases}).trainer

    run("first").run(range(3), max_epochs=1)
    run("moved").run(range(3), max_epochs=2)
    with pytest.raises(ValueError, match="with data#training#0 a#weight 1.0, now 2.0, data#training#1 b#weight"):
        run("moved", weight=2.0).run(range(3), max_epochs=3)
    (tmp_path / "moved/b").write_bytes(b"c")
    with pytest.raises(ValueError, match="interrupted run with data#training#1 b#image "):
        run("moved").run(range(3), max_epochs=3)


def test_cases_without_a_name_may_grow_as_in_monai_label(tmp_path):
    path = tmp_path / "run.pt"
    for number in (1, 2):
        (tmp_path / f"{number}").write_bytes(b"label")
        cases = [{"label": str(tmp_path / f"{k + 1}")} for k in range(number)]
        run = Run(path, data={"training": cases})
        run.trainer.run(range(3), max_epochs=number)
        assert run.epochs == [number]


def test_another_number_of_processes_is_named(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    Run(path).trainer.run(range(3), max_epochs=1)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="interrupted run with processes 1, now 2; repeat"):
        Run(path).trainer.run(range(3), max_epochs=2)


def test_a_file_of_an_older_version_goes_on_with_what_it_knows(tmp_path, caplog):
    path = tmp_path / "run.pt"
    Run(path, resolved=RESOLVED).trainer.run(range(3), max_epochs=1)
    content = torch.load(path, weights_only=True)
    del content["run"]
    torch.save({**content, "options": {"seed": 0}}, path)
    again = Run(path, resolved=RESOLVED)
    again.trainer.run(range(3), max_epochs=2)
    assert again.epochs == [2]
    assert (
        f"{path}: was written by an older version; not compared are anatomy, batch_size, data, processes" in caplog.text
    )
    torch.save({**content, "options": {"seed": 0}}, path)
    with pytest.raises(ValueError, match="interrupted run with seed 0, now 1; repeat"):
        Run(path, resolved=RESOLVED | {"seed": 1}).trainer.run(range(3), max_epochs=2)
