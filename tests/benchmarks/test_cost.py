"""The claims of benchmarks/cost.py that are exact counts, and the counting itself."""

import cost
import pytest
import torch


@pytest.fixture(scope="module")
def networks():
    return cost.rivals()


def test_flops_of_a_convolution_are_the_textbook_count():
    rival = cost.Rival(
        torch.nn.Conv3d(3, 5, 3, padding=1), lambda n: {"x": torch.randn(1, 3, n, n, n)}, lambda net, x: net(x)
    )
    assert cost.count_flops(rival, 6) == 2 * 6**3 * 3 * 5 * 27


def test_training_bytes_of_a_small_chain_by_hand():
    """Kept: the input, the activation (once, though two layers keep it), and both arguments of the squared error."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    rival = cost.Rival(network, lambda n: {"x": torch.randn(n, 4)}, lambda net, x: net(x))
    parameters = 4 * 8 + 8 + 8 * 2 + 2
    assert cost.count_training_bytes(rival, 10) == 4 * (10 * 4 + 10 * 8 + 2 * 10 * 2 + 2 * parameters)


@pytest.fixture(scope="module")
def flops(networks):
    return {name: cost.count_flops(networks[name], 32) for name in (cost.OURS, cost.CACHED, cost.MEAN, cost.BASELINE)}


@pytest.mark.parametrize("name", [cost.MEAN, cost.CACHED])
def test_flops_are_at_most_two_thirteenths_of_the_concatenated_network(flops, name):
    assert flops[name] * cost.TARGETS["flops"][1] <= flops[cost.BASELINE]


def test_a_full_call_is_the_mean_and_one_cached_step(flops):
    assert flops[cost.OURS] == pytest.approx(flops[cost.MEAN] + flops[cost.CACHED], rel=1e-3)


def test_tensors_kept_for_training_are_at_most_a_third_of_those_of_the_concatenated_network(networks):
    """Parameters apart, whose share falls with the size of the volume: ours has twice as many."""

    def kept(name):
        parameters = sum(p.numel() * p.element_size() for p in networks[name].network.parameters())
        return cost.count_training_bytes(networks[name], 32) - 2 * parameters

    assert kept(cost.OURS) * cost.TARGETS["training_mib"][1] <= kept(cost.BASELINE)


def test_all_networks_give_one_velocity(networks):
    with torch.no_grad():
        for name, rival in networks.items():
            assert rival.call(rival.network, **rival.inputs(16)).shape == (1, 1, 16, 16, 16), name


def test_cached_step_is_given_a_condition_of_the_encoded_shape(networks):
    encoded = networks[cost.OURS].network.encode(networks[cost.OURS].inputs(16)["context"])
    cached = networks[cost.CACHED].inputs(16)["condition"]
    assert [t.shape for t in encoded] == [t.shape for t in cached]
