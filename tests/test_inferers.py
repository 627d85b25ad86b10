"""Rendering by windows: exact where the predictor is local, independent of batch, order and cache."""

import itertools

import pytest
import torch

from custom.inferers import StructDiffInferer, blended, case_noise, windows_of
from custom.networks import CONTEXT_CHANNELS, StructDiffUNet
from custom.schedulers import ListedDDIMScheduler

SIZES = [(17, 24, 9), (16, 16, 16), (33, 7, 20)]
SCALE_HU = 100.0


class LocalNetwork:
    """A velocity that is linear in x and context, voxel by voxel, so cutting into windows must not change it."""

    def __init__(self):
        self.encoded = []
        self.alphas_cumprod = ListedDDIMScheduler().alphas_cumprod

    def sigma_map(self, context):
        return torch.ones(len(context), 8, *(n // 2 for n in context.shape[2:]))

    def encode(self, context):
        self.encoded.append(tuple(context.shape[2:]))
        return context

    def denoise(self, x, timesteps, condition):
        assert x.shape[2:] == condition.shape[2:]
        return (0.2 + timesteps.view(-1, 1, 1, 1, 1) / 2000) * x - 0.01 * condition[:, :1] + 0.001 * condition[:, 1:2]


def make_context(size, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = 100 * torch.randn(batch, len(CONTEXT_CHANNELS), *size, generator=generator)
    context[:, 4:] = 100  # HU: the residual unit is 1
    context[:, [0, 2]] = torch.randint(0, 3, (batch, 2, *size), generator=generator).float()
    return context


def make_inferer(times=3, **options):
    return StructDiffInferer(ListedDDIMScheduler(times), residual_scale_hu=SCALE_HU, **options)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = StructDiffUNet(num_labels=3, channels=(8, 16, 16), condition_channels=6).eval()
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.02)
    network.set_residual_sigma(torch.full_like(network.residual_sigma, 0.5))
    return network


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("roi", [(8, 8, 8), (16, 6, 32), (2, 64, 12)])
@pytest.mark.parametrize("size", [*SIZES, (1, 2, 3)])
def test_windows_cover_the_volume_from_even_starts(size, roi, overlap):
    seen = torch.zeros(size)
    for window in windows_of(size, roi, overlap):
        for part, limit, n in zip(window, roi, size, strict=True):
            assert part.start % 2 == 0
            assert part.stop % 2 == 0 or part.stop == n
            assert 0 < part.stop - part.start <= limit
        seen[window] += 1
    assert seen.min() >= 1


def test_windows_share_the_asked_overlap():
    starts = sorted({window[0].start for window in windows_of((64, 16, 16), (16, 16, 16), 0.5)})
    assert starts == [0, 8, 16, 24, 32, 40, 48]


@pytest.mark.parametrize("size", SIZES)
def test_a_window_as_large_as_the_volume_is_the_only_one(size):
    assert len(windows_of(size, [64, 64, 64], 0.4)) == 1
    assert len(windows_of(size, [n + n % 2 for n in size], 0.4)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_without_a_window_the_whole_volume_is_encoded_once(size):
    local = LocalNetwork()
    make_inferer()(make_context(size), local, ["a"])
    assert local.encoded == [size]


@pytest.mark.parametrize("size", SIZES)
def test_one_large_window_is_the_whole_volume_bit_for_bit(network, size):
    context = make_context(size)
    whole = make_inferer()(context, network, ["a"])
    assert torch.equal(make_inferer(roi_size=[64, 64, 64])(context, network, ["a"]), whole)


@pytest.mark.parametrize("overlap", [0.0, 0.4])
@pytest.mark.parametrize("size", SIZES)
def test_windows_of_a_local_predictor_change_nothing(size, overlap):
    context = make_context(size, 2)
    whole = make_inferer()(context, LocalNetwork(), ["a", "b"])
    windowed = make_inferer(roi_size=[8, 8, 8], overlap=overlap)(context, LocalNetwork(), ["a", "b"])
    assert windowed.shape == (2, 1, *size)
    torch.testing.assert_close(windowed / SCALE_HU, whole / SCALE_HU, rtol=0, atol=1e-5)


def test_one_step_rendering_is_an_euler_step_of_the_case_noise_on_top_of_the_prior():
    """One network call and sigma = 1: x0 = x - psi v, psi the angle of the time, times the scale, plus the prior."""
    context = make_context((6, 4, 4))
    result = make_inferer([600], seed=7)(context, LocalNetwork(), ["patient"])
    alpha = ListedDDIMScheduler([600]).alphas_cumprod[600]
    x = case_noise((1, 6, 4, 4), 7, "patient")[None]
    v = (0.2 + 600 / 2000) * x - 0.01 * context[:, :1] + 0.001 * context[:, 1:2]
    expected = SCALE_HU * (x - torch.atan2((1 - alpha).sqrt(), alpha.sqrt()) * v) + context[:, 3:4]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_gaussian_residual_keeps_its_spread_at_any_number_of_steps(steps):
    """With F = 0, the exact answer for Gaussian grain, the residual has the tabulated sd; DDIM would shrink it."""
    network = StructDiffUNet(num_labels=11, channels=(8, 8), condition_channels=4).eval()  # fresh: F = 0
    network.set_residual_sigma(torch.full_like(network.residual_sigma, 0.3))
    context = torch.zeros(1, len(CONTEXT_CHANNELS), 24, 24, 24)
    context[:, 4:] = 100  # HU: the residual unit is 1
    result = make_inferer(steps)(context, network, ["patient"])
    assert result.std() == pytest.approx(0.3 * SCALE_HU, rel=0.03)


def test_result_is_clamped_to_the_range():
    context = make_context((8, 8, 8))
    result = make_inferer(hu_range=(-20.0, 35.0))(context, LocalNetwork(), ["a"])
    assert result.min() == -20
    assert result.max() == 35


def test_blending_weighs_by_distance_and_keeps_constants():
    windows = windows_of((20, 9, 11), (8, 8, 8), 0.4)
    result = blended(lambda part, index: torch.full_like(part, 3.0), torch.zeros(1, 1, 20, 9, 11), windows)
    torch.testing.assert_close(result, torch.full_like(result, 3.0))
    pair = [(slice(0, 8), slice(0, 8), slice(0, 8)), (slice(4, 12), slice(0, 8), slice(0, 8))]
    ramp = blended(lambda part, index: torch.full_like(part, float(index)), torch.zeros(1, 1, 12, 8, 8), pair)[
        0, 0, :, 4, 4
    ]
    assert ramp[:4].tolist() == [0.0] * 4
    assert ramp[8:].tolist() == [1.0] * 4
    assert (ramp[3:9].diff() > 0).all()
    torch.testing.assert_close(ramp, 1 - ramp.flip(0))


def test_windows_of_a_network_approach_the_whole_volume_as_they_grow(network):
    """Zero padding, group norms and attention see the cut.

    Measured with these random weights: 15 %, 12 % and 6 % of the residual's spread for windows of 24, 32 and 48 voxels.
    """
    context = make_context((64, 24, 24))
    prior, inner = context[:, 3:4], (..., *[slice(6, -6)] * 3)
    whole = (make_inferer()(context, network, ["a"]) - prior)[inner]
    differences = []
    for size, overlap in ((24, 0.66), (32, 0.5), (48, 0.5)):
        windowed = make_inferer(roi_size=[size, 24, 24], overlap=overlap)(context, network, ["a"]) - prior
        differences.append(float((windowed[inner] - whole).std() / whole.std()))
    assert differences == sorted(differences, reverse=True), differences
    assert differences[0] < 0.2, differences
    assert 1e-3 < differences[-1] < 0.09, differences


@pytest.mark.parametrize("roi", [None, [8, 8, 8]], ids=["whole", "windows"])
def test_a_case_does_not_depend_on_its_batch_or_order(network, roi):
    names = ["a", "b", "c"]
    context = make_context((16, 9, 12), 3)
    inferer = make_inferer(roi_size=roi)
    alone = [inferer(context[i : i + 1], network, [names[i]]) for i in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        together = inferer(context[order], network, [names[i] for i in order])
        expected = torch.cat([alone[i] for i in order])
        torch.testing.assert_close(together / SCALE_HU, expected / SCALE_HU, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [0, 1, 3])
def test_bounded_cache_changes_the_work_but_not_the_result(network, cached):
    context = make_context((20, 8, 16))
    full = make_inferer(roi_size=[8, 8, 8])(context, network, ["a"])
    assert torch.equal(make_inferer(roi_size=[8, 8, 8], cached_windows=cached)(context, network, ["a"]), full)
    local = LocalNetwork()
    make_inferer(4, roi_size=[8, 8, 8], cached_windows=cached)(context, local, ["a"])
    windows = len(windows_of((20, 8, 16), (8, 8, 8), 0.4))
    assert windows > 3
    assert len(local.encoded) == cached + 4 * (windows - cached)
    assert set(local.encoded) == {(8, 8, 8)}


def test_rendering_records_no_gradients_and_leaves_the_context_alone(network):
    context = make_context((8, 8, 8))
    before = context.clone()
    assert not make_inferer()(context, network, ["a"]).requires_grad
    assert torch.equal(context, before)


def test_case_noise_depends_on_seed_and_name_only():
    torch.manual_seed(1)
    noise = case_noise((1, 9, 8, 7), 3, "patient_01")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(case_noise((1, 9, 8, 7), 3, "patient_01"), noise)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was not touched
    for seed, name in ((4, "patient_01"), (3, "patient_02"), (3, "")):
        other = case_noise((1, 9, 8, 7), seed, name)
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.2


def test_case_noise_is_standard_normal_and_new_for_every_case():
    draws = torch.stack([case_noise((1, 16, 16, 16), seed, name) for seed, name in itertools.product(range(3), "abc")])
    assert draws.mean().abs() < 0.02
    assert abs(float(draws.std()) - 1) < 0.02
    assert (torch.corrcoef(draws.flatten(1)) - torch.eye(9)).abs().max() < 0.1


@pytest.mark.parametrize("roi", [[8, 8, 7], [0, 8, 8], [8, -2, 8]])
def test_odd_or_empty_windows_are_refused(roi):
    with pytest.raises(ValueError, match="roi_size: windows must have positive even sizes, got") as error:
        make_inferer(roi_size=roi)
    assert str(roi) in str(error.value)


@pytest.mark.parametrize("overlap", [1.0, -0.1])
def test_overlap_out_of_range_is_refused(overlap):
    with pytest.raises(ValueError, match=rf"overlap: must be in \[0, 1\), got {overlap}"):
        make_inferer(overlap=overlap)


def test_every_sample_needs_a_name():
    with pytest.raises(ValueError, match="cases: one name for each of the 2 samples is needed, got 1"):
        make_inferer()(make_context((8, 8, 8), 2), LocalNetwork(), ["a"])
