"""Batches made into problems for the engines, and what is measured of the diffusion while it is trained."""

import math

import pytest
import torch
from custom.diffusion.context import Context
from custom.diffusion.loss import StructDiffLoss, label_edges
from custom.diffusion.network import Prediction, StructDiffUNet
from custom.diffusion.noise import case_noise
from custom.diffusion.training import HeldOutLoss, MomentsFirst, PrepareRendering, PrepareResidualDiffusion
from custom.volumes.grids import pad_to_multiple
from custom.volumes.haar import haar_pack
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer

CPU = torch.device("cpu")


def batch_of(size=(8, 8, 8), cases=("a", "b"), seed=0):
    """A cube in a background, whose structure lies 100 HU times noise off a prior of 40 HU."""
    shape = (len(cases), 1, *size)
    image = 40 + 100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    label, prior = torch.zeros(shape), torch.full(shape, 40.0)
    label[:, :, 2:4, 2:4, 2:4] = 1
    context = Context(label, torch.zeros(shape), label, prior).stacked()
    return {"image": image, "label": label, "prior": prior, "context": context, "case": list(cases)}


def make_network():
    torch.manual_seed(0)
    return StructDiffUNet(num_labels=2, channels=(8, 8), condition_channels=4).eval()


def test_a_training_batch_is_noise_and_the_residual_at_times_of_its_own():
    network, batch = make_network(), batch_of(cases="abcd")
    torch.manual_seed(3)
    x, target, (timesteps, context), options = PrepareResidualDiffusion(network)(batch, CPU)
    torch.manual_seed(3)
    assert torch.equal(x, torch.randn(4, 1, 8, 8, 8))
    assert len(set(timesteps.tolist())) > 1
    assert timesteps.dtype == torch.int64
    torch.testing.assert_close(options["residual"], (batch["image"] - 40.0) / 100)
    assert torch.equal(context, batch["context"])
    assert torch.equal(target["label"], batch["label"])
    assert (target.keys(), options.keys()) == ({"label"}, {"residual"})


def test_times_of_training_cover_the_schedule_evenly():
    network, batch = make_network(), batch_of((2, 2, 2), cases=["a"] * 4000)
    torch.manual_seed(0)
    times = PrepareResidualDiffusion(network)(batch, CPU)[2][0]
    assert times.min() < 5
    assert times.max() in range(995, 1000)
    assert float(times.float().mean()) == pytest.approx(499.5, abs=25)  # five standard errors


def test_a_training_batch_is_what_the_network_takes():
    network = make_network()
    x, _, args, options = PrepareResidualDiffusion(network)(batch_of(), CPU)
    with torch.no_grad():
        prediction = SimpleInferer()(x, network, *args, **options)
    assert isinstance(prediction, Prediction)
    assert prediction.velocity.shape == prediction.wanted.shape == (2, 8, 4, 4, 4)


@pytest.mark.parametrize("known", [True, False])
def test_a_rendering_batch_has_its_case_names_and_the_scan_where_there_is_one(known):
    """The structure is no truth: what is rendered has grain, as the scan."""
    batch = batch_of()
    if known:
        batch["scan"] = batch["image"] + 30.0
    context, truth, args, options = PrepareRendering()(batch, CPU)
    assert torch.equal(context, batch["context"])
    assert truth.shape == (2, 2 if known else 1, 8, 8, 8)
    assert torch.equal(truth[:, -1:], batch["label"])
    if known:
        assert torch.equal(truth[:, :1], batch["scan"])
    assert (args, options) == ((), {"cases": ["a", "b"]})


# Moments first


def epochs_of_moments(network, epochs, *, resumed_after=0):
    """`moments_only` in every epoch of a training of four."""
    seen, engine = [], Engine(lambda engine, batch: seen.append(network.moments_only))
    MomentsFirst(network, epochs=epochs).attach(engine)
    if resumed_after:
        engine.load_state_dict({"epoch_length": 1, "max_epochs": 4, "iteration": resumed_after})
        engine.run([0])
    else:
        engine.run([0], max_epochs=4)
    return seen


@pytest.mark.parametrize(("epochs", "expected"), [(2, [True, True, False, False]), (0, [False] * 4), (9, [True] * 4)])
def test_moments_are_trained_alone_in_the_first_epochs(epochs, expected):
    assert epochs_of_moments(make_network(), epochs) == expected


@pytest.mark.parametrize(("epochs", "expected"), [(3, [True, False]), (2, [False, False])])
def test_a_resumed_training_goes_on_with_what_its_epoch_trains(epochs, expected):
    assert epochs_of_moments(make_network(), epochs, resumed_after=2) == expected


@pytest.mark.parametrize(("epochs", "warned"), [(4, True), (9, True), (3, False)])
def test_a_training_that_ends_before_the_diffusion_begins_says_so(epochs, warned, caplog):
    epochs_of_moments(make_network(), epochs)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = f"moments_epochs {epochs} of max_epochs 4: the U-Net is not trained; lower it"
    assert [message.startswith(expected) for message in said] == [True] * warned


# What the U-Net explains


class Known:
    """In place of a network: a U-Net that explains half of the velocity at label edges and a tenth elsewhere."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, timesteps, context, residual):
        self.asked.append((timesteps.tolist(), x))
        wanted = haar_pack(pad_to_multiple(x - residual, 4))
        edge = label_edges(pad_to_multiple(context[:, :1], 4))
        velocity = wanted * torch.where(edge, 0.5, 0.1)
        return Prediction(torch.zeros_like(wanted), torch.ones_like(wanted), velocity, wanted)


def metrics_of(network, batches, **options):
    engine = Engine(lambda engine, batch: engine.fire_event(IterationEvents.FORWARD_COMPLETED))
    engine.register_events(*IterationEvents)
    HeldOutLoss(network, loss=StructDiffLoss(), device=CPU, **options).attach(engine, "score")
    runs = [engine.run(run).metrics.copy() for run in batches]
    return runs[-1]


def test_the_score_is_minus_the_loss_of_the_training_over_all_times():
    batch, network, loss = batch_of(), Known(), StructDiffLoss()
    score = metrics_of(network, [[batch]], timesteps=[200, 700])["score"]
    residual = (batch["image"] - batch["prior"]) / 100
    losses = [loss(network(x, torch.tensor(t), batch["context"], residual), batch) for t, x in network.asked[:2]]
    assert score == pytest.approx(-float(torch.stack(losses).mean()), rel=1e-5)
    assert score < -0.1


@pytest.mark.parametrize("size", [(8, 8, 8), (7, 9, 10)])
def test_what_remains_of_the_loss_is_told_at_edges_and_elsewhere_at_every_time(size):
    network = Known()
    metrics = metrics_of(network, [[batch_of(size), batch_of(size, cases=("c",))]], timesteps=[200, 700])
    assert metrics.pop("score") < 0
    places = {"edge": 0.25, "elsewhere": 0.81}
    expected = {f"remaining_{place}_{t}": value for t in (200, 700) for place, value in places.items()}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert [times for times, _ in network.asked] == [[200, 200], [700, 700], [200], [700]]


def test_a_unet_that_says_nothing_leaves_everything():
    metrics = metrics_of(make_network(), [[batch_of()]])
    metrics.pop("score")
    assert len(metrics) == 8
    assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0), rel=1e-6)


def test_what_remains_is_a_sum_over_cases_whatever_their_batches():
    torch.manual_seed(0)
    network = make_network()
    torch.nn.init.normal_(network.unet.out[-1].conv.weight, 0, 0.3)
    batch = batch_of(cases=("a", "b"))
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    whole, single, again = (metrics_of(network, runs) for runs in ([[batch]], [parts], [[batch_of(seed=5)], [batch]]))
    assert whole["remaining_edge_400"] != pytest.approx(1, abs=1e-3)
    assert single == pytest.approx(whole, rel=1e-5)
    assert again == pytest.approx(whole, rel=1e-6), "each evaluation starts anew"


def test_noise_of_the_measure_is_that_of_the_case():
    network = Known()
    torch.manual_seed(1)
    metrics_of(network, [[batch_of()]], timesteps=[500])
    ((_, noise),) = network.asked
    assert torch.equal(noise, torch.stack([case_noise((1, 8, 8, 8), 0, case) for case in "ab"]))


def test_without_an_edge_nothing_is_known_of_edges():
    batch = batch_of()
    for labels in (batch["label"], batch["context"][:, :1]):
        labels.zero_()
    metrics = metrics_of(Known(), [[batch]], timesteps=[500])
    assert math.isnan(metrics["remaining_edge_500"])
    assert metrics["remaining_elsewhere_500"] == pytest.approx(0.81, rel=1e-5)


def test_the_measure_is_that_of_the_epoch_before_others_write_it():
    """Loggers read the metrics at the end of an epoch, after handlers that are attached earlier."""
    engine, seen = Engine(lambda engine, batch: engine.fire_event(IterationEvents.FORWARD_COMPLETED)), []
    engine.register_events(*IterationEvents)
    HeldOutLoss(Known(), loss=StructDiffLoss(), device=CPU, timesteps=[500]).attach(engine, "score")
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.extend(e.state.metrics))
    engine.run([batch_of()])
    assert seen == ["score", "remaining_edge_500", "remaining_elsewhere_500"]
