"""The rivals of our renderer are what they are said to be, of one cost, and trained by a loop that can be stopped."""

import math

import pytest
import rival_evaluation
import rivals
import torch
from common import ANATOMY, TRAIN_CONFIG
from custom.diffusion import PrepareResidualDiffusion
from monai.bundle import ConfigParser
from rival_networks import ARMS, condition_of, draw, scaled, step_flops
from torch.utils.flop_counter import FlopCounterMode

SIZE = 16  # the instance norms of SPADE need more than a voxel on the fourth level


def pairs(size: int, count: int = 2) -> dict[str, torch.Tensor]:
    shape = (count, 1, size, size, size)
    labels = {
        key: torch.randint(0, ANATOMY.num_labels, shape, dtype=torch.uint8) for key in ("label", "template_label")
    }
    return {**labels, **{key: 300 * torch.randn(shape) for key in ("image", "template_image")}}


def our_step_flops(size: int, count: int) -> int:
    """Of a training step of our whole network, as train.json has it."""
    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG))
    network, loss = (parser.get_parsed_content(name) for name in ("network_def", "loss"))
    batch = pairs(size, count)
    context = torch.cat([batch["label"], batch["template_image"], batch["template_label"], batch["image"]], 1)
    prepare = PrepareResidualDiffusion(network)
    noise, target, others, named = prepare({**batch, "prior": batch["image"], "context": context})
    with FlopCounterMode(display=False) as counter:
        loss(network(noise, *others, **named), target).backward()
    return counter.get_total_flops()


def test_pairs_are_made_of_files_and_again_of_what_was_kept_of_them(cohort, tmp_path):
    for _ in range(2):  # the second time of the kept file
        pair = rivals.Pairs(str(cohort), tmp_path, 1)[0]
        assert {key: tuple(volume.shape) for key, volume in pair.items()} == dict.fromkeys(rivals.PAIR, (1, 32, 32, 32))
        assert set(pair["label"].unique().tolist()) <= set(range(ANATOMY.num_labels))
    assert len(list(tmp_path.glob("*.pt"))) == 1


@pytest.mark.parametrize("arm", ARMS)
def test_a_training_step_costs_what_ours_costs(arm):
    network, wanted = ARMS[arm](), our_step_flops(32, 1)
    for stage in range(network.stages):
        network.begin(stage)
        assert step_flops(network, pairs(32, 1))["step"] == pytest.approx(wanted, rel=0.15)


def test_condition_holds_both_masks_and_the_template():
    batch = pairs(4)
    condition, labels = condition_of(batch), ANATOMY.num_labels
    assert condition.shape == (2, 2 * labels + 1, 4, 4, 4)
    assert torch.equal(condition[:, :labels].argmax(1, keepdim=True), batch["label"].long())
    assert torch.equal(condition[:, labels : 2 * labels].argmax(1, keepdim=True), batch["template_label"].long())
    assert torch.equal(condition[:, 2 * labels :], scaled(batch["template_image"]))


def perturbed(arm: str) -> torch.nn.Module:
    """An arm whose layers that start at zero do not hide what it reads."""
    torch.manual_seed(0)
    network = ARMS[arm]().eval()
    network.begin(network.stages - 1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return network


@pytest.mark.parametrize("key", ["label", "template_image", "template_label"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_reads_every_input(arm, key):
    network, batch, other, x = perturbed(arm), pairs(SIZE), pairs(SIZE), torch.randn(2, 1, SIZE, SIZE, SIZE)
    with torch.no_grad():
        first, second = (
            network(x, torch.full((2,), 500), condition_of(given)) for given in (batch, {**batch, key: other[key]})
        )
    assert not torch.allclose(first, second)


def test_control_starts_as_a_copy_and_leaves_the_network_as_it_is():
    torch.manual_seed(0)
    network = ARMS["controlnet"]()
    network.begin(0)
    x, batch = torch.randn(2, 1, 8, 8, 8), pairs(8)
    before = network(x, torch.zeros(2), condition_of(batch))
    trained = network.begin(1)
    torch.testing.assert_close(network(x, torch.zeros(2), condition_of(batch)), before)
    assert {id(weight) for weight in trained} == {id(weight) for weight in network.control.parameters()}
    unet = network.unet.state_dict()
    assert all(torch.equal(value, unet[name]) for name, value in network.control.state_dict().items() if name in unet)


def test_images_of_odd_size_are_drawn():
    batch = pairs(11, 1)
    image = draw(perturbed("concat"), condition_of(batch), torch.randn(1, 1, 11, 11, 11), 3)
    assert image.shape == (1, 1, 11, 11, 11)
    assert bool(image.isfinite().all())


def test_windows_that_cover_a_volume_give_what_the_whole_gives():
    """Of a network that looks at single voxels."""

    class Voxelwise(torch.nn.Module):
        def forward(self, x, timesteps, condition):
            return 0.1 * x + condition[:, -1:]

    condition, noise = condition_of(pairs(24, 1)), torch.randn(1, 1, 24, 24, 24)
    whole, parts = (draw(Voxelwise(), condition, noise, 3, window) for window in (None, 16))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-2)


def test_learning_rate_warms_up_and_ends_low():
    rates = [rivals.rate_at(step, step / 2000) for step in range(2001)]
    assert rates[0] == pytest.approx(1 / rivals.WARM_UP_STEPS, rel=1e-3)
    assert rates[-1] == pytest.approx(rivals.END_LEARNING_RATE)
    assert max(rates) == pytest.approx(1, abs=0.03)


class StoppedError(Exception):
    """Of a process that is killed."""


def endless(stop_after: float = math.inf):
    made = 0
    while made < stop_after:
        made += 1
        yield pairs(SIZE)
    raise StoppedError


def training(folder, arm, steps):
    options = {"steps": steps, "seconds": math.inf, "learning_rate": 1e-3, "device": "cpu"}
    return rivals.Training(arm, state=folder / "state.pt", **options)


@pytest.mark.parametrize("arm", ARMS)
def test_a_stopped_training_goes_on_where_it_saved(tmp_path, monkeypatch, arm):
    monkeypatch.setattr(rivals, "SAVE_EVERY", 2)
    monkeypatch.setattr(rivals, "LOG_EVERY", 2)
    stages = ARMS[arm]().stages
    with pytest.raises(StoppedError):
        training(tmp_path, arm, 12).run(endless(8 + stages))  # the cost of each stage is measured on a batch of its own
    second = training(tmp_path, arm, 12)
    assert second.done["steps"] == ([8] if stages == 1 else [6, 2])
    second.run(endless())
    assert second.done["steps"] == [12 // stages] * stages
    assert [len(losses) for losses in second.done["losses"]] == [6 // stages] * stages
    assert len(second.done["flops"]) == stages


def test_a_finished_stage_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "SAVE_EVERY", 2)
    training(tmp_path, "concat", 2).run(endless())
    again = training(tmp_path, "concat", 2)
    again.run(endless(0))
    assert again.done["steps"] == [2]


def test_time_ends_a_training_as_steps_do(tmp_path):
    one = training(tmp_path, "concat", 10**9)
    one.seconds = 1e-9
    one.run(endless())
    assert one.done["steps"] == [1]


def test_the_randomised_rival_is_asked_for_its_own_colours_and_the_prior_for_those_of_the_template(tmp_path):
    found = rival_evaluation.arms(tmp_path, {}, device="cpu", steps=1, window=None, our_steps=1)
    assert list(found) == ["painted prior", "painted, randomised"]
    rng, label = torch.Generator().manual_seed(0), torch.zeros(1, 24, 24, 24)
    label[:, 6:18, 6:18, 6:18] = 3
    image = torch.where(label > 0, 400.0, -100.0) + 5 * torch.randn(label.shape, generator=rng)
    statistics = torch.full((ANATOMY.num_labels, 2), 400.0)
    item = {"case": "a", "label": label, "template_label": label, "template_image": image, "statistics": statistics}
    item |= {"prior": image, "grain_spectrum": torch.ones(1, 17, 17, 9), "noise_sd": 20.0}
    prior, randomised = (found[name].asked(item) for name in found)
    assert prior is item
    change = randomised["prior"][0, 9:15, 9:15, 9:15].mean() - image[0, 9:15, 9:15, 9:15].mean()
    assert abs(change) > 10
    assert randomised["noise_sd"] != 20.0
    judged = randomised["statistics"][:, 0].isfinite().nonzero()[:, 0].tolist()
    assert judged == ANATOMY.thin, "nothing but vessels is held against what was drawn"


def test_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"arm: must be one of \['concat', 'controlnet', 'spade'\], got 'gan'"):
        rivals.train("gan", "nowhere")
