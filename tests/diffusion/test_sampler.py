"""Rendering by windows: exact where the predictor is local, independent of batch, order and cache."""

import itertools

import pytest
import torch
from custom.diffusion.context import RESIDUAL_UNIT_HU, Context
from custom.diffusion.formulas import amplitudes
from custom.diffusion.network import Condition, StructDiffUNet, near_labels
from custom.diffusion.noise import case_noise
from custom.diffusion.sampler import StructDiffInferer, blended, drawn_box, windows_of
from custom.volumes.grids import pad_to_multiple
from custom.volumes.haar import haar_pack, haar_unpack

SIZES = [(17, 24, 9), (16, 16, 16), (33, 7, 20)]
ALPHAS = StructDiffUNet(num_labels=2, channels=(8, 8), condition_channels=4).alphas_cumprod


def even(size):
    return tuple(n + n % 2 for n in size)


class LocalNetwork:
    """Flow and moments that are functions of one block, so cutting into windows must not change the result."""

    def __init__(self):
        self.encoded, self.called = [], 0
        self.alphas_cumprod = ALPHAS

    def encode(self, context, near=None):
        self.encoded.append(tuple(context.shape[2:]))
        bands = haar_pack(context)
        return Condition(bands, bands[:, :1], 0.003 * bands[:, 24:], (0.002 * bands[:, 8:16]).exp())

    def flow(self, y, timesteps, features):
        assert y.shape[2:] == features.shape[2:]
        self.called += 1
        time = timesteps.view(-1, 1, 1, 1, 1) / 2000
        return (0.2 + time) * y - 0.01 * features[:, :8] + 0.001 * features[:, 8:16]


def make_context(size, batch=1, seed=0, *, labels=True):
    generator = torch.Generator().manual_seed(seed)
    context = 100 * torch.randn(batch, len(Context._fields), *size, generator=generator)
    context[:, [0, 2]] = torch.randint(0, 3, (batch, 2, *size), generator=generator).float()
    if not labels:  # nothing is shifted to the means of labels then
        context[:, [0, 2]] = -1
    return context


def make_inferer(times=3, **options):
    return StructDiffInferer(times, **options)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = StructDiffUNet(num_labels=3, channels=(8, 16, 16), condition_channels=6).eval()
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.02)
    return network


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("roi", [(8, 8, 8), (16, 6, 32), (2, 64, 12)])
@pytest.mark.parametrize("size", [*map(even, SIZES), (2, 2, 4)])
def test_windows_cover_the_volume_from_even_starts_to_even_stops(size, roi, overlap):
    seen = torch.zeros(size)
    for window in windows_of(size, roi, overlap):
        for part, limit, n in zip(window, roi, size, strict=True):
            assert part.start % 2 == part.stop % 2 == 0
            assert 0 < part.stop - part.start <= limit
            assert part.stop <= n
        seen[window] += 1
    assert seen.min() >= 1


def test_windows_share_the_asked_overlap():
    starts = sorted({window[0].start for window in windows_of((64, 16, 16), (16, 16, 16), 0.5)})
    assert starts == [0, 8, 16, 24, 32, 40, 48]


@pytest.mark.parametrize("size", map(even, SIZES))
def test_a_window_as_large_as_the_volume_is_the_only_one(size):
    whole = [tuple(slice(0, n) for n in size)]
    assert windows_of(size, [64, 64, 64], 0.4) == windows_of(size, size, 0.4) == whole
    assert len(windows_of(size, [n - 2 for n in size], 0.4)) == 8


def test_windows_are_as_small_as_their_number_allows():
    assert [(w[0].start, w[0].stop) for w in windows_of((170, 16, 16), (128, 128, 128), 0.4)] == [(0, 108), (62, 170)]
    assert [(w[0].start, w[0].stop) for w in windows_of((134, 16, 16), (128, 128, 128), 0.0)] == [(0, 68), (66, 134)]


def heart_in(size, heart):
    """A context whose labels fill a box, with another one for the template."""
    context = make_context(size)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[heart] = True
    context[:, [0, 2]] *= inside
    return context


def test_only_a_box_around_labels_is_encoded_and_drawn(network):
    size, heart = (64, 72, 90), (slice(2, 8), slice(30, 36), slice(40, 46))
    context, local = heart_in(size, heart), LocalNetwork()
    near = near_labels(Context.of(context))
    box = drawn_box(near)
    outside = torch.ones_like(near, dtype=torch.bool)
    outside[..., box[0], box[1], box[2]] = False
    assert not near[outside].any()
    assert box == (slice(0, 14), slice(5, 28), slice(10, 33)), "six blocks around the heart, and four of margin"
    make_inferer()(context, local, ["a"])
    assert local.encoded == [(28, 46, 46)]
    structure = make_inferer()(context, network, ["a"])
    far = torch.nn.functional.interpolate(outside.float(), scale_factor=2).bool()
    assert torch.equal(structure[far], context[:, 3:4].clamp(*make_inferer().hu_range)[far])
    assert not torch.equal(structure, context[:, 3:4])


def test_everything_is_drawn_where_nothing_tells_what_is_near(network):
    absent = make_context((16, 12, 8), labels=False)
    assert drawn_box(near_labels(Context.of(absent))) == (slice(0, 8), slice(0, 6), slice(0, 4))
    empty = heart_in((16, 12, 8), (slice(0),) * 3)
    assert drawn_box(near_labels(Context.of(empty))) == (slice(0, 8), slice(0, 6), slice(0, 4))
    assert torch.isfinite(make_inferer()(empty, network, ["a"])).all()


@pytest.mark.parametrize("size", SIZES)
def test_without_a_window_the_whole_volume_is_encoded_once(size):
    local = LocalNetwork()
    make_inferer()(make_context(size), local, ["a"])
    assert local.encoded == [even(size)]


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
    torch.testing.assert_close(windowed / RESIDUAL_UNIT_HU, whole / RESIDUAL_UNIT_HU, rtol=0, atol=1e-5)


class FlatNetwork(LocalNetwork):
    """Moments that differ by band but not in space; the flow is y / 4 + 1 / 2."""

    mean = torch.linspace(-1, 1, 8).view(1, 8, 1, 1, 1)
    sigma = torch.linspace(0.2, 2, 8).view(1, 8, 1, 1, 1)

    def encode(self, context, near=None):
        grid = [n // 2 for n in context.shape[2:]]
        mean, sigma = (part.expand(len(context), -1, *grid) for part in (self.mean, self.sigma))
        return Condition(torch.zeros(len(context), 1, *grid), mean[:, :1], mean, sigma)

    def flow(self, y, timesteps, features):
        self.called += 1
        return y / 4 + 0.5


def test_one_step_rendering_is_an_euler_step_of_the_case_noise():
    """y = noise - psi F, psi the angle of the time; (mean + sigma y), times the unit, plus the prior."""
    context = make_context((6, 4, 4), labels=False)
    result = make_inferer([600], seed=7)(context, FlatNetwork(), ["patient"])
    x, alpha = haar_pack(case_noise((1, 6, 4, 4), 7, "patient")[None]), ALPHAS[600]
    y = x - torch.atan2((1 - alpha).sqrt(), alpha.sqrt()) * (x / 4 + 0.5)
    residual = haar_unpack(FlatNetwork.mean + FlatNetwork.sigma * y)
    torch.testing.assert_close(result, RESIDUAL_UNIT_HU * residual + context[:, 3:4], rtol=1e-4, atol=1e-2)


class GaussianNetwork(FlatNetwork):
    """The exact flow of a remainder that is white noise of this deviation."""

    deviation = 0.5

    def flow(self, y, timesteps, features):
        a, s = amplitudes(self.alphas_cumprod, timesteps, 5)
        return y * a * s * (1 - self.deviation**2) / (a**2 * self.deviation**2 + s**2)


def test_the_exact_flow_of_a_narrower_gaussian_draws_it_and_the_error_falls_with_the_steps():
    context, errors = make_context((8, 8, 8), labels=False), []
    x = haar_pack(case_noise((1, 8, 8, 8), 0, "a")[None])
    exact = RESIDUAL_UNIT_HU * haar_unpack(FlatNetwork.mean + FlatNetwork.sigma * 0.5 * x) + context[:, 3:4]
    for steps in (10, 20, 40):
        errors.append(float((make_inferer(steps)(context, GaussianNetwork(), ["a"]) - exact).std() / exact.std()))
    assert errors[0] < 0.02, errors
    assert errors[2] < errors[1] / 2 < errors[0] / 4, errors


@pytest.fixture(scope="module")
def idle():
    """A network whose U-Net says nothing: mean and deviation of its own in every band and place."""
    torch.manual_seed(0)
    network = StructDiffUNet(num_labels=3, channels=(8, 8), condition_channels=4).eval()
    torch.nn.init.normal_(network.regressor.out[-1].conv.weight, 0, 0.1)
    return network


@pytest.mark.parametrize("steps", [1, 3, [999, 400, 20]])
def test_without_a_word_of_the_unet_the_sample_is_mean_and_sigma_noise_at_any_number_of_steps(idle, steps):
    """The exact answer for a Gaussian residual; DDIM would shrink it by the cosine of every step."""
    context = make_context((12, 12, 12), labels=False)
    result = make_inferer(steps, seed=2)(context, idle, ["patient"])
    with torch.no_grad():
        *_, mean, sigma = idle.encode(context)
    assert mean.std() > 0.05
    assert sigma.log().std() > 0.05
    drawn = mean + sigma * haar_pack(case_noise((1, 12, 12, 12), 2, "patient")[None])
    torch.testing.assert_close(result, RESIDUAL_UNIT_HU * haar_unpack(drawn) + context[:, 3:4], rtol=0, atol=1e-2)


@pytest.mark.parametrize("roi", [None, [8, 8, 8]], ids=["whole", "windows"])
def test_at_strength_zero_the_mean_is_rendered_without_a_call_of_the_unet(network, roi):
    context, local = make_context((12, 9, 10), labels=False), LocalNetwork()
    result = make_inferer(10, sample_strength=0, roi_size=roi)(context, local, ["a"])
    assert local.called == 0
    mean = haar_unpack(local.encode(pad_to_multiple(context, 2)).mean)[..., :9, :]
    expected = RESIDUAL_UNIT_HU * mean + context[:, 3:4]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-2)
    calls, hook = [], network.unet.register_forward_hook(lambda *_: calls.append(1))
    mean = make_inferer(10, sample_strength=0, roi_size=roi, seed=1)(context, network, ["a"])
    assert torch.equal(mean, make_inferer(3, sample_strength=0, roi_size=roi, seed=2)(context, network, ["b"]))
    assert not calls
    make_inferer(2, sample_strength=0.1, roi_size=roi)(context, network, ["a"])
    hook.remove()
    assert len(calls) == 2 * (len(windows_of((12, 10, 10), roi, 0.4)) if roi else 1)


@pytest.mark.parametrize("strength", [0, 1])
def test_labels_have_the_means_that_a_template_says(network, strength):
    context = make_context((12, 12, 12), 2)
    image = make_inferer(2, sample_strength=strength)(context, network, ["a", "b"])
    for sample, channels in zip(image[:, 0], context, strict=True):
        for label in (1, 2):
            assert (sample - channels[3])[channels[0] == label].mean().abs() < 0.01


@pytest.mark.parametrize("roi", [None, [8, 8, 8]])
def test_a_mask_alone_is_rendered_with_its_own_drawing_as_template(network, roi):
    mixed = make_context((12, 12, 12), 2)
    mixed[1, 1], mixed[1, 2] = 0, -1
    inferer = make_inferer(2, sample_strength=0, roi_size=roi)
    with torch.no_grad():
        context = inferer._context(mixed, network)
    assert torch.equal(context[0], mixed[0])
    label, template, template_label, prior = context[1]
    for found, wanted in ((label, mixed[1, 0]), (template_label, label), (template, prior)):
        assert torch.equal(found, wanted)
    rendered = inferer(mixed, network, ["a", "b"])
    torch.testing.assert_close(rendered[1:], inferer(context[1:], network, ["b"]), rtol=0, atol=1e-2)
    for k in (1, 2):
        assert prior[label == k].unique().numel() == 1
        assert (rendered[1, 0] - prior)[label == k].mean().abs() < 0.01


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_goes_straight_from_the_mean_to_the_full_sample(network, strength):
    context = make_context((8, 7, 12), 2)
    mean, part, full = (
        make_inferer(2, sample_strength=share)(context, network, ["a", "b"]) for share in (0, strength, 1.0)
    )
    assert (full - mean).std() > 5
    torch.testing.assert_close(part, mean + strength * (full - mean), rtol=1e-5, atol=1e-2)
    assert torch.equal(make_inferer(2)(context, network, ["a", "b"]), full)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_beyond_mean_and_sample_is_refused(strength):
    with pytest.raises(ValueError, match=rf"sample_strength: must be between 0 \(the mean\) and 1 .*, got {strength}"):
        make_inferer(sample_strength=strength)


def test_result_is_clamped_to_the_range():
    context = make_context((8, 8, 8))
    result = make_inferer(hu_range=(-20.0, 35.0))(context, LocalNetwork(), ["a"])
    assert result.min() == -20
    assert result.max() == 35


def test_blending_weighs_by_distance_and_keeps_constants():
    def block(value, window):
        return torch.full((1, 2, *(axis.stop - axis.start for axis in window)), float(value))

    windows = windows_of((20, 10, 12), (8, 8, 8), 0.4)
    assert len(windows) > 8
    result = blended(lambda index: block(3, windows[index]), windows, (20, 10, 12))
    torch.testing.assert_close(result, torch.full((1, 2, 20, 10, 12), 3.0))
    pair = [(slice(0, 8), slice(0, 8), slice(0, 8)), (slice(4, 12), slice(0, 8), slice(0, 8))]
    ramp = blended(lambda index: block(index, pair[index]), pair, (12, 8, 8))[0, 0, :, 4, 4]
    assert ramp[:4].tolist() == [0.0] * 4
    assert ramp[8:].tolist() == [1.0] * 4
    assert (ramp[3:9].diff() > 0).all()
    torch.testing.assert_close(ramp, 1 - ramp.flip(0))


@pytest.mark.parametrize("count", [1, 2])
def test_every_window_is_predicted_once(count):
    pair = [(slice(0, 4),) * 3, (slice(4, 8), slice(0, 4), slice(0, 4))][:count]
    asked = []
    blended(lambda index: asked.append(index) or torch.zeros(1, 8, 4, 4, 4), pair, (4 * count, 4, 4))
    assert asked == list(range(count))


def test_windows_of_a_network_approach_the_whole_volume_as_they_grow(network):
    """Zero padding, group norms and attention see the cut.

    Measured with these random weights: 28 %, 20 % and 9 % of the residual's spread for windows of 24, 32 and 48
    voxels.
    """
    context = make_context((64, 24, 24))
    prior, inner = context[:, 3:4], (..., *[slice(6, -6)] * 3)
    whole = (make_inferer()(context, network, ["a"]) - prior)[inner]
    differences = []
    for size, overlap in ((24, 0.66), (32, 0.5), (48, 0.66)):
        windowed = make_inferer(roi_size=[size, 24, 24], overlap=overlap)(context, network, ["a"]) - prior
        differences.append(float((windowed[inner] - whole).std() / whole.std()))
    assert differences == sorted(differences, reverse=True), differences
    assert differences[0] < 0.3, differences
    assert 1e-3 < differences[-1] < 0.15, differences


@pytest.mark.parametrize("roi", [None, [8, 8, 8]], ids=["whole", "windows"])
def test_a_case_does_not_depend_on_its_batch_or_order(network, roi):
    names = ["a", "b", "c"]
    context = make_context((16, 9, 12), 3)
    inferer = make_inferer(roi_size=roi)
    alone = [inferer(context[i : i + 1], network, [names[i]]) for i in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        together = inferer(context[order], network, [names[i] for i in order])
        expected = torch.cat([alone[i] for i in order])
        torch.testing.assert_close(together, expected, rtol=0, atol=0.05)  # HU; images are written in steps of 1


@pytest.mark.parametrize("cached", [0, 1, 3])
def test_bounded_cache_changes_the_work_but_not_the_result(network, cached):
    context = make_context((20, 8, 16))
    full = make_inferer(roi_size=[8, 8, 8])(context, network, ["a"])
    assert torch.equal(make_inferer(roi_size=[8, 8, 8], cached_windows=cached)(context, network, ["a"]), full)
    local = LocalNetwork()
    make_inferer(4, roi_size=[8, 8, 8], cached_windows=cached)(context, local, ["a"])
    windows = len(windows_of((20, 8, 16), (8, 8, 8), 0.4))
    assert windows > 3
    assert len(local.encoded) == cached + (1 + 4) * (windows - cached)  # once for the moments, then at every step
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


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_rendering_that_is_not_finite_is_refused_with_its_case_before_limits_hide_it(bad, strength):
    class Spoilt(LocalNetwork):
        def encode(self, context, near=None):
            whole = super().encode(context)
            whole.mean[1:] = bad if strength == 0 else 0.0
            return whole

        def flow(self, y, timesteps, features):
            return torch.cat([torch.zeros_like(y[:1]), torch.full_like(y[1:], bad)])

    with pytest.raises(
        ValueError, match="^second: the rendering is NaN or infinite, .* another `ckpt_dir`, or train anew"
    ):
        make_inferer(sample_strength=strength)(make_context((8, 8, 8), 2), Spoilt(), ["first", "second"])


def test_labels_outside_a_window_count_in_it():
    """What is drawn is told by the whole volume: else a window of background leaves alone what its neighbour draws."""
    network = StructDiffUNet(num_labels=2, channels=(8, 16)).eval()
    torch.nn.init.constant_(network.point_spread.bias, 0.2)
    context = torch.zeros(1, 4, 48, 8, 8)
    context[:, 0, 25:28] = context[:, 2, 25:28] = 1
    whole, windowed = (
        StructDiffInferer(2, sample_strength=0, roi_size=roi)(context, network, ["a"]) for roi in (None, [24, 8, 8])
    )
    assert whole[0, 0, :, 4, 4].unique().numel() > 2
    torch.testing.assert_close(windowed, whole, rtol=0, atol=1e-3)
