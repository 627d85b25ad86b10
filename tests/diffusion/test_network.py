"""The network: exact where a closed form exists, invariant where it must be, loud where the input is wrong."""

import pytest
import torch
from custom.diffusion.context import MODES, Context
from custom.diffusion.formulas import amplitudes
from custom.diffusion.network import Condition, StructDiffUNet, near_labels, one_hot_blocks
from custom.volumes.grids import pad_to_multiple
from custom.volumes.haar import haar_pack, haar_unpack, space_to_depth

NUM_LABELS = 4
SIZES = [(16, 16, 16), (15, 9, 18), (7, 24, 11)]


def make_network(seed=0, **options):
    torch.manual_seed(seed)
    return StructDiffUNet(num_labels=NUM_LABELS, channels=(8, 16, 16), condition_channels=6, **options).eval()


def shaken(network, seed=1):
    """Fill what MONAI initialises to zero, so that every path carries signal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
    return network


def make_context(size, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_LABELS, (batch, 2, *size), generator=generator).float()
    images = 300 * torch.randn(batch, 2, *size, generator=generator)
    return Context(labels[:, :1], images[:, :1], labels[:, 1:], images[:, 1:]).stacked()


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return shaken(make_network())


def input_of_unet(network, *args):
    """What the U-Net of the diffusion is shown, band by band of the remainder, in one call of the network."""
    seen = []
    hook = network.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, :8]))
    with torch.no_grad():
        network(*args)
    hook.remove()
    return seen


# Context


def test_dropped_label_maps_select_the_mode():
    context = torch.zeros(4, len(Context._fields), 4, 4, 4)  # background only, but present
    context[1, 2] = -1
    context[2, 0] = context[2, 2] = -1
    context[3, 0, 0, 0, 0] = 3
    context[3, 2] = -1
    assert [MODES[i] for i in Context.of(context).modes()] == ["template", "mask_only", "unconditional", "mask_only"]


def test_a_context_is_stacked_in_the_order_of_its_names():
    context = make_context((3, 4, 5), 2)
    named = Context.of(context)
    assert torch.equal(named.stacked(), context)
    assert torch.equal(named.images(), context[:, [1, 3]])


@pytest.mark.parametrize("shape", [(4, 8, 8, 8), (1, 6, 8, 8, 8), (1, 3, 8, 8, 8)])
def test_malformed_context_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"context: must be \(B, 4, H, W, D\) with channels .*prior_hu.* got") as error:
        network.encode(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_one_hot_blocks_leave_out_unknown_ids():
    label = torch.tensor([-1.0, 0, 1, 2, 3, 4, 2.0001, 0.9999]).reshape(1, 1, 2, 2, 2)
    blocks = one_hot_blocks(label, NUM_LABELS).reshape(NUM_LABELS, 8)
    expected = torch.tensor([[-1, 0, 1, 2, 3, 4, 2, 1]]) == torch.arange(NUM_LABELS)[:, None]
    assert torch.equal(blocks, expected.float())


# Moments


def test_a_fresh_network_predicts_a_mean_of_zero_one_deviation_and_no_velocity():
    network, context = make_network(), make_context((8, 9, 7))
    with torch.no_grad():
        _, near, mean, sigma = network.encode(context)
        velocity = network(noise(1, 1, 8, 9, 7), torch.tensor([400]), context)
    assert (near == 1).all()
    assert not mean.any()
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.3))  # 30 HU
    assert not velocity.any()


def test_the_mean_is_in_single_voxels():
    network, values = make_network(), noise(8)
    network.regressor.out[-1].conv.bias.data[:8] = values
    network.point_spread.bias.data = 0.1 * noise(8, seed=4)  # in units of 500 HU
    with torch.no_grad():
        mean = network.encode(make_context((8, 16, 8))).mean
    blocks = space_to_depth(haar_unpack(mean))
    expected = values + 0.5 * noise(8, seed=4)
    torch.testing.assert_close(blocks, expected.view(1, 8, 1, 1, 1).expand_as(blocks))


@pytest.mark.parametrize(("channel", "name"), [(0, "template_image_hu"), (8, "prior_hu")])
def test_the_linear_part_of_the_mean_reads_template_and_prior_in_their_unit(channel, name):
    """Reading the low-pass band into every voxel of a block gives sqrt(8) times its mean, in units of 100 HU."""
    network, context = make_network(), make_context((16, 8, 24))
    network.point_spread.weight.data[:, channel, 1, 1, 1] = 1.0
    with torch.no_grad():
        mean = haar_unpack(network.encode(context).mean)
    blocks = torch.nn.functional.avg_pool3d(getattr(Context.of(context), name), 2) * 8**0.5 / 100
    torch.testing.assert_close(mean, torch.nn.functional.interpolate(blocks, scale_factor=2.0))


def test_the_deviation_is_exponential_in_what_the_regressor_says_and_stays_in_its_range():
    network, values = make_network(), torch.tensor([-1e4, -2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 1e4])
    network.regressor.out[-1].conv.bias.data[8:] = values
    with torch.no_grad():
        sigma = network.encode(make_context((8, 8, 8))).sigma
    expected = (0.3 * values.exp()).clamp(0.01, 5.0)
    torch.testing.assert_close(sigma, expected.view(1, 8, 1, 1, 1).expand_as(sigma))
    assert sigma.amin() == pytest.approx(0.01)
    assert sigma.amax() == 5


def test_only_the_moments_are_predicted_when_nothing_else_is_asked_for(network):
    x, context, residual = noise(1, 1, 8, 8, 8), make_context((8, 8, 8)), noise(1, 1, 8, 8, 8, seed=4)
    args = (x, torch.tensor([300]), context, residual)
    with torch.no_grad():
        whole = network(*args)
    network.moments_only = True
    try:
        with torch.no_grad():
            moments = network(*args)
        assert input_of_unet(network, *args) == []
    finally:
        network.moments_only = False
    assert moments.velocity is moments.wanted is None
    assert torch.equal(moments.error, whole.error)
    assert torch.equal(moments.sigma, whole.sigma)
    assert whole.velocity is not None


# Near the labels


def distant(size=(16, 16, 40), *, template=True):
    """Labels in the first blocks alone: voxels 0 to 3 of the target, 4 and 5 of the template."""
    context = make_context(size)
    context[:, [0, 2]] = 0 if template else -1
    context[:, 0, ..., :4] = 2
    if template:
        context[:, 2, ..., 4:6] = 1
    return context


def test_what_is_drawn_fades_between_two_and_seven_blocks_from_the_labels_of_target_and_template():
    near = near_labels(Context.of(distant()))
    assert near.shape == (1, 1, 8, 8, 20)
    expected = [1.0] * 5 + [0.8, 0.6, 0.4, 0.2] + [0.0] * 11  # the last label is in block 2
    torch.testing.assert_close(near, torch.tensor(expected).expand_as(near))


def test_without_a_template_everything_is_drawn():
    assert (near_labels(Context.of(distant(template=False))) == 1).all()
    assert (near_labels(Context.absent(torch.zeros(1, 1, 4, 6, 8))) == 1).all()


def test_a_template_without_labels_near_a_target_without_them_draws_nothing():
    context = make_context((8, 8, 8))
    context[:, [0, 2]] = 0
    assert not near_labels(Context.of(context)).any()


def test_far_from_labels_the_prior_is_right_and_nothing_is_learned(network):
    """The mean is 0 and the deviation at its least; a residual there counts for nothing."""
    context, size = distant(), (16, 16, 40)
    x, t = noise(1, 1, *size), torch.tensor([300])
    residual = noise(1, 1, *size, seed=4)
    far = (..., slice(9, None))
    with torch.no_grad():
        condition = network.encode(context)
        one = network(x, t, context, residual)
        residual[..., 18:] += 50
        other = network(x, t, context, residual)
    assert condition.mean[..., :5].abs().max() > 1e-3
    assert not condition.mean[far].any()
    torch.testing.assert_close(condition.sigma[far], torch.full_like(condition.sigma[far], 0.01))
    assert not one.error[far].any()
    for part, same in zip(one, other, strict=True):
        assert torch.equal(part, same)


def test_where_it_fades_a_share_of_the_residual_is_asked_for():
    network, context, size = make_network(), distant(), (16, 16, 40)
    residual = noise(1, 1, *size, seed=4)
    with torch.no_grad():
        error = network(noise(1, 1, *size), torch.tensor([300]), context, residual).error
    shares = torch.tensor([1.0] * 5 + [0.8, 0.6, 0.4, 0.2] + [0.0] * 11)
    torch.testing.assert_close(error, haar_pack(residual) * shares)


# The remainder


def test_velocity_has_the_shape_of_the_volume_at_every_size(network):
    for size in SIZES:
        with torch.no_grad():
            velocity = network(noise(2, 1, *size), torch.tensor([3, 700]), make_context(size, 2))
        assert velocity.shape == (2, 1, *size)
        assert velocity.isfinite().all()
        assert velocity.std() > 1e-3


@pytest.mark.parametrize("t", [30, 500, 950])
def test_in_training_the_unet_sees_the_noisy_standardised_remainder_and_its_velocity_is_wanted(network, t):
    x, context, residual = noise(2, 1, 9, 16, 11), make_context((9, 16, 11), 2), noise(2, 1, 9, 16, 11, seed=4)
    timesteps = torch.tensor([t, 1000 - t])
    with torch.no_grad():
        features, near, mean, sigma = network.encode(context)
        prediction = network(x, timesteps, context, residual)
    eps, packed = (haar_pack(pad_to_multiple(part, network.size_multiple)) for part in (x, residual))
    error = near * packed - mean
    z = error / sigma
    a, s = amplitudes(network.alphas_cumprod, timesteps, 5)
    torch.testing.assert_close(prediction.error, error)
    torch.testing.assert_close(prediction.sigma, sigma)
    torch.testing.assert_close(prediction.wanted, a * eps - s * z)
    with torch.no_grad():
        torch.testing.assert_close(prediction.velocity, network.flow(a * z + s * eps, timesteps, features))
    (seen,) = input_of_unet(network, x, timesteps, context, residual)
    torch.testing.assert_close(seen, a * z + s * eps)


@pytest.mark.parametrize("t", [5, 400, 999])
def test_what_the_unet_sees_and_is_asked_for_has_unit_variance_when_the_moments_are_right(t):
    """Bands of deviations from 3 to 270 HU and means of their size: 4096 blocks, an error of 1 % a band."""
    network, size = make_network(), (32, 32, 32)
    network.regressor.out[-1].conv.bias.data = torch.cat([noise(8), torch.linspace(-2.3, 2.2, 8)])
    context = make_context(size)
    with torch.no_grad():
        _, _, mean, sigma = network.encode(context)
        residual = haar_unpack(mean + sigma * noise(1, 8, 16, 16, 16, seed=5))
        args = (noise(1, 1, *size), torch.tensor([t]), context, residual)
        wanted = network(*args).wanted
    (seen,) = input_of_unet(network, *args)
    assert sigma.amax() / sigma.amin() > 50
    for bands in (seen, wanted):
        torch.testing.assert_close(bands[0].flatten(1).std(1), torch.ones(8), rtol=0.06, atol=0)
        assert bands[0].flatten(1).mean(1).abs().max() < 0.1


def test_without_a_residual_x_is_the_remainder_itself(network):
    x, timesteps, context = noise(2, 1, 10, 16, 8), torch.tensor([10, 500]), make_context((10, 16, 8), 2)
    with torch.no_grad():
        features = network.encode(context).features
        flow = network.flow(haar_pack(pad_to_multiple(x, network.size_multiple)), timesteps, features)
        torch.testing.assert_close(network(x, timesteps, context), haar_unpack(flow)[:, :, :10])


def test_a_sample_does_not_depend_on_its_batch(network):
    x, timesteps, context = noise(3, 1, 16, 9, 12), torch.tensor([10, 500, 990]), make_context((16, 9, 12), 3)
    context[1, 2], context[1, 1] = -1, 0
    context[2, :3], context[2, 1] = -1, 0
    with torch.no_grad():
        together = network(x, timesteps, context)
        alone = torch.cat([network(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_velocity_error_trains_all_but_the_moments():
    """The remainder is made by them: they could make it easy. They are trained by their own loss, see test_loss.py."""
    network, context = shaken(make_network()).train(), make_context((16, 16, 16), 2)
    args = (noise(2, 1, 16, 16, 16), torch.tensor([100, 600]), context, noise(2, 1, 16, 16, 16, seed=8))
    moments = {name for name, _ in network.named_parameters() if name.startswith(("regressor.", "point_spread."))}
    prediction = network(*args)
    assert not prediction.wanted.requires_grad
    (prediction.velocity - prediction.wanted).square().mean().backward()
    assert {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()} == moments
    network.zero_grad()
    network(*args[:3]).square().mean().backward()
    assert {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()} == moments


@pytest.mark.parametrize("channel", range(len(Context._fields)), ids=Context._fields)
def test_every_context_channel_changes_velocity_mean_and_deviation(network, channel):
    context = make_context((8, 8, 8))
    other = context.clone()
    other[:, channel] = make_context((8, 8, 8), seed=5)[:, channel]
    x, t = noise(1, 1, 8, 8, 8), torch.tensor([300])
    with torch.no_grad():
        assert (network(x, t, context) - network(x, t, other)).abs().max() > 1e-3
        before, after = network.encode(context), network.encode(other)
    assert (before.mean - after.mean).abs().max() > 1e-3
    assert (before.sigma - after.sigma).abs().max() > 1e-4


def test_the_velocity_depends_on_the_mean_and_not_on_the_deviation(network):
    """The U-Net is told the image that is expected; a remainder is of unit variance whatever sigma is."""
    twin = make_network()
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    with torch.no_grad():
        before = network(x, t, context)
        for outputs, told in ((slice(8), True), (slice(8, 16), False)):
            twin.load_state_dict(network.state_dict())
            twin.regressor.out[-1].conv.bias.data[outputs] += 1.0
            assert bool((twin(x, t, context) - before).abs().max() > 1e-3) == told


@pytest.mark.parametrize("shape", [(2, 1, 8, 8, 8), (1, 1, 8, 8, 6)])
def test_x_must_fit_the_context(network, shape):
    with pytest.raises(ValueError, match="x .* and context .*: batch and spatial sizes must agree"):
        network(torch.zeros(shape), torch.tensor([3]), make_context((8, 8, 8)))


def test_what_is_absent_is_unconditional_at_the_last_time(network):
    """The model zoo asks a network for its shape with the image alone."""
    x, channels = noise(2, 1, 9, 8, 7), torch.zeros(2, len(Context._fields), 9, 8, 7)
    channels[:, [0, 2]] = -1
    assert Context.of(channels).modes().tolist() == [MODES.index("unconditional")] * 2
    with torch.no_grad():
        assert torch.equal(network(x), network(x, torch.tensor([999, 999]), channels))


def test_padding_of_the_context_is_what_encode_does(network):
    context = make_context((10, 8, 13))
    with torch.no_grad():
        whole, padded = network.encode(context), network.encode(pad_to_multiple(context, network.size_multiple))
    for name, part in whole._asdict().items():
        assert torch.equal(part, getattr(padded, name)), name
        assert part.shape[2:] == (8, 4, 8), name


# Options, state and export


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="num_labels: background and at least one label are needed, got 1"):
        StructDiffUNet(num_labels=1)


def test_channels_that_no_group_norm_divides_are_refused_with_an_example():
    with pytest.raises(
        ValueError, match=r"network_def#channels: must be multiples of norm_num_groups, 8, got \[8, 12\]"
    ):
        StructDiffUNet(num_labels=2, channels=(8, 12))


def test_the_state_keeps_the_velocity(network):
    copy = make_network(seed=7)
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    with torch.no_grad():
        assert not torch.equal(copy(x, t, context), network(x, t, context))
        copy.load_state_dict(network.state_dict())
        assert torch.equal(copy(x, t, context), network(x, t, context))


def test_weights_of_an_older_network_are_refused_by_name_and_leave_the_own(network):
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"trained by version 0.3.0 or older, for another network; train anew, or"):
        network.load_state_dict(state | {"moments.table": torch.ones(3, 6, 8)})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_amp_in_bf16_stays_close_and_returns_float32(network):
    emulated = make_network(amp=True)
    emulated.load_state_dict(network.state_dict())
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    with torch.no_grad():
        pairs = [(emulated(x, t, context), network(x, t, context))]
        encoded = zip(emulated.encode(context), network.encode(context), strict=True)
        pairs += [pair for name, pair in zip(Condition._fields, encoded, strict=True) if name != "near"]
    for half, full in pairs:
        assert half.dtype == torch.float32
        assert not torch.equal(half, full)
        assert (half - full).std() < 0.05 * full.std()


def test_precision_is_not_chosen_by_what_the_processor_can_do(network, monkeypatch):
    """As on a processor with native bf16 (Sapphire Rapids, AMX): the same velocity as on any other."""
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    able = {"avx512_bf16": True, "amx_bf16": True, "amx_tile": True, "avx512_f": True}
    results = []
    for capabilities in ({}, able):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        twin = make_network()
        twin.load_state_dict(network.state_dict())
        with torch.no_grad():
            results.append(twin(x, t, context))
    assert torch.equal(*results)


def test_shipped_size_fits_the_weight_limit():
    """25 MB of float32 weights, the limit of the bundle."""
    assert sum(p.numel() for p in StructDiffUNet(num_labels=11).parameters()) < 6.2e6


def test_torchscript_gives_the_same_velocity_at_every_size_and_in_every_mode(network, tmp_path):
    torch.jit.save(torch.jit.script(network), tmp_path / "network.ts")
    loaded = torch.jit.load(tmp_path / "network.ts")
    for size, batch in zip(SIZES, (1, 2, 3), strict=True):
        image, timesteps = noise(batch, 1, *size), torch.arange(batch) * 300 + 100
        context = make_context(size, batch)
        mask_only = context.clone()
        mask_only[:, 1], mask_only[:, 2] = 0.0, -1.0
        unconditional = mask_only.clone()
        unconditional[:, 0] = -1.0
        for mode in (context, mask_only, unconditional) if batch == 1 else (context,):
            with torch.no_grad():
                expected = network(image, timesteps, mode)
                torch.testing.assert_close(loaded(image, timesteps, mode), expected, rtol=1e-4, atol=1e-4)
            assert expected.std() > 0.01
