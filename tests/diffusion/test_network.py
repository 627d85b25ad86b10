"""The network: exact where a closed form exists, invariant where it must be, loud where the input is wrong."""

import pytest
import torch
from custom.diffusion.context import MODES, Context
from custom.diffusion.correspondence import CorrespondenceAttention, two_way_consistency
from custom.diffusion.formulas import amplitudes, precondition
from custom.diffusion.moments import REGIONS
from custom.diffusion.network import StructDiffUNet, one_hot_blocks
from custom.volumes.grids import pad_to_multiple
from custom.volumes.haar import depth_to_space, haar_pack, space_to_depth
from torch.nn import functional as F

NUM_LABELS = 4
SIZES = [(16, 16, 16), (15, 9, 18), (7, 24, 11)]


def make_network(correspondence_channels=0, seed=0, **options):
    torch.manual_seed(seed)
    return StructDiffUNet(
        num_labels=NUM_LABELS,
        channels=(8, 16, 16),
        condition_channels=6,
        correspondence_channels=correspondence_channels,
        **options,
    ).eval()


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
    sd = 10 + 30 * torch.rand(batch, len(Context._fields) - 4, *size, generator=generator)
    return torch.cat([labels[:, :1], images[:, :1], labels[:, 1:], images[:, 1:], sd], 1)


def blank_context(size, batch=1):
    """Background only, everything at 0 HU, and spreads of 100 HU: the residual unit is 1 everywhere."""
    context = torch.zeros(batch, len(Context._fields), *size)
    context[:, 4:] = 100.0
    return context


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def varied_table():
    return 0.1 + noise(len(MODES), len(REGIONS), 8).abs()


@pytest.fixture(scope="module")
def network():
    network = shaken(make_network())
    network.moments.set_table(varied_table())
    return network


@pytest.mark.parametrize("correspondence_channels", [0, 8])
@pytest.mark.parametrize("size", SIZES)
def test_velocity_has_the_shape_of_the_volume(size, correspondence_channels):
    network = make_network(correspondence_channels)
    with torch.no_grad():
        velocity = network(noise(2, 1, *size), torch.tensor([3, 700]), make_context(size, 2))
    assert velocity.shape == (2, 1, *size)
    assert velocity.isfinite().all()


@pytest.mark.parametrize("sigma", [0.2, 1.0, 3.0])
def test_fresh_network_predicts_the_gaussian_posterior_mean(sigma):
    """Its last convolution is zero, so v = c_skip x; with one sigma everywhere the packing drops out."""
    network = make_network()
    network.moments.set_table(torch.full_like(network.moments.table, sigma))
    x, timesteps = noise(2, 1, 12, 9, 14), torch.tensor([50, 800])
    with torch.no_grad():
        velocity = network(x, timesteps, blank_context((12, 9, 14), 2))
    alpha = network.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    expected = (alpha * (1 - alpha)).sqrt() * (1 - sigma**2) / (alpha * sigma**2 + 1 - alpha) * x
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-6)


def test_sigma_table_acts_band_by_band():
    """A table that is 1 but for the low-pass band: block means follow sigma, details are plain v-prediction (zero)."""
    network = make_network()
    table = torch.ones_like(network.moments.table)
    table[..., 0] = 0.1
    network.moments.set_table(table)
    x, t = noise(1, 1, 8, 8, 8), torch.tensor([400])
    with torch.no_grad():
        velocity = network(x, t, blank_context((8, 8, 8)))
    a, s = amplitudes(network.alphas_cumprod, t, 5)
    means = F.interpolate(F.avg_pool3d(x, 2), scale_factor=2, mode="nearest")
    torch.testing.assert_close(velocity, precondition(a, s, torch.tensor(0.1))[1] * means, rtol=1e-5, atol=1e-6)


def test_sigma_table_acts_voxel_by_voxel_at_label_edges():
    """A table that is 1 but outside the labels next to them: only those voxels follow sigma."""
    network = make_network()
    table = torch.ones_like(network.moments.table)
    table[:, REGIONS.index("label_edge_outside")] = 0.1
    network.moments.set_table(table)
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([400]), blank_context((8, 8, 8))
    context[:, 0, 3:] = 1  # the face lies inside block 1, voxels 2 and 3
    with torch.no_grad():
        velocity = network(x, t, context)
    a, s = amplitudes(network.alphas_cumprod, t, 5)
    expected = torch.zeros_like(x)
    expected[:, :, 2] = precondition(a, s, torch.tensor(0.1))[1][0, 0, 0] * x[:, :, 2]
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [30, 400, 950])
def test_without_flow_the_velocity_is_the_posterior_mean_of_a_gaussian_of_the_moments(t):
    """F = 0 and known moments: E[v | x] from the 16 x 16 joint covariance of (x0, eps), block by block in float64."""
    network = make_network()
    network.moments.set_table(0.2 + varied_table())
    network.moments.linear.bias.data = 0.2 * noise(8, seed=5)
    network.moments.hidden[-1].bias.data[8:] = 0.5 * noise(8, seed=6)
    x, context = noise(1, 1, 8, 8, 8), blank_context((8, 8, 8))
    context[:, 0, :, :, 3:5] = 1  # blocks 1 and 2 along the last axis are edge
    with torch.no_grad():
        velocity = network(x, torch.tensor([t]), context)
        sigma = network.encode(context).sigma.double()[0].flatten(1).T  # (blocks, 8)
    identity = torch.eye(8, dtype=torch.float64)
    haar = haar_pack(depth_to_space(identity.view(8, 8, 1, 1, 1))).view(8, 8).T  # voxels of a block -> bands
    edge = torch.tensor([False, True, True, False]).repeat(16).view(-1, 1, 1)
    basis = torch.where(edge, identity, haar)
    joint = torch.zeros(64, 16, 16, dtype=torch.float64)
    joint[:, :8, :8] = basis.mT @ torch.diag_embed(sigma**2) @ basis
    joint[:, 8:, 8:] = identity
    a, s = (part.double().item() for part in amplitudes(network.alphas_cumprod, torch.tensor([t]), 1))
    of_x, of_v = torch.cat([a * identity, s * identity], 1), torch.cat([-s * identity, a * identity], 1)
    mean = 5.0 * network.moments.linear.bias.detach().double()  # of each voxel of a block, in units of 100 HU
    deviation = space_to_depth(x)[0].flatten(1).T.double() - a * mean
    gain = of_v @ joint @ of_x.T @ torch.linalg.inv(of_x @ joint @ of_x.T)
    expected = (gain @ deviation[:, :, None])[:, :, 0] - s * mean
    torch.testing.assert_close(space_to_depth(velocity)[0].flatten(1).T.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_mean_shifts_the_noisy_sample_and_the_velocity_of_a_shaken_network():
    """v(x + a m | mean m) = v(x | mean 0) - s m, with m in single voxels."""
    network = shaken(make_network())
    network.moments.set_table(varied_table())
    for last in (network.moments.linear, network.moments.hidden[-1]):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    m = depth_to_space(5.0 * noise(8, seed=5).view(1, 8, 1, 1, 1).expand(1, 8, 4, 4, 4))
    a, s = amplitudes(network.alphas_cumprod, t, 5)
    with torch.no_grad():
        plain = network(x, t, context)
        network.moments.linear.bias.data = noise(8, seed=5)
        shifted = network(x + a * m, t, context)
    torch.testing.assert_close(shifted, plain - s * m, rtol=1e-4, atol=1e-4)


def test_forward_is_denoise_of_encode(network):
    x, timesteps, context = noise(2, 1, 10, 16, 8), torch.tensor([10, 500]), make_context((10, 16, 8), 2)
    with torch.no_grad():
        assert torch.equal(network(x, timesteps, context), network.denoise(x, timesteps, network.encode(context)))


@pytest.mark.parametrize("correspondence_channels", [0, 8])
def test_a_sample_does_not_depend_on_its_batch(correspondence_channels):
    network = shaken(make_network(correspondence_channels))
    network.moments.set_table(varied_table())
    x, timesteps, context = noise(3, 1, 16, 9, 12), torch.tensor([10, 500, 990]), make_context((16, 9, 12), 3)
    context[1, 2], context[1, 1] = -1, 0
    context[2, :3], context[2, 1] = -1, 0
    with torch.no_grad():
        together = network(x, timesteps, context)
        alone = torch.cat([network(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("correspondence_channels", [0, 8])
def test_velocity_error_trains_all_but_the_moments(correspondence_channels):
    """They are trained by their own likelihood, see test_loss.py."""
    network = shaken(make_network(correspondence_channels)).train()
    network.moments.set_table(varied_table())
    velocity = network(noise(2, 1, 16, 16, 16), torch.tensor([100, 600]), make_context((16, 16, 16), 2))
    (velocity - noise(*velocity.shape, seed=9)).square().mean().backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {f"moments.{name}" for name, _ in network.moments.named_parameters()}


@pytest.mark.parametrize("channel", range(len(Context._fields)), ids=Context._fields)
def test_every_context_channel_changes_the_velocity(network, channel):
    context = make_context((8, 8, 8))
    other = context.clone()
    other[:, channel] = make_context((8, 8, 8), seed=5)[:, channel]
    x, t = noise(1, 1, 8, 8, 8), torch.tensor([300])
    with torch.no_grad():
        assert (network(x, t, context) - network(x, t, other)).abs().max() > 1e-3


def test_one_hot_blocks_leave_out_unknown_ids():
    label = torch.tensor([-1.0, 0, 1, 2, 3, 4, 2.0001, 0.9999]).reshape(1, 1, 2, 2, 2)
    blocks = one_hot_blocks(label, NUM_LABELS).reshape(NUM_LABELS, 8)
    expected = torch.tensor([[-1, 0, 1, 2, 3, 4, 2, 1]]) == torch.arange(NUM_LABELS)[:, None]
    assert torch.equal(blocks, expected.float())


@pytest.mark.parametrize("shape", [(1, 4, 8, 8, 8), (6, 8, 8, 8), (1, 7, 8, 8, 8)])
def test_malformed_context_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"context: must be \(B, 6, H, W, D\) with channels .*prior_hu.* got") as error:
        network.encode(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8, 8), (1, 1, 8, 8, 6)])
def test_x_must_fit_the_context(network, shape):
    with pytest.raises(ValueError, match="x .* and context .*: batch and spatial sizes must agree"):
        network(torch.zeros(shape), torch.tensor([3]), blank_context((8, 8, 8)))


def test_what_is_absent_is_unconditional_at_the_last_time(network):
    """The model zoo asks a network for its shape with the image alone."""
    x, channels = noise(2, 1, 9, 8, 7), torch.zeros(2, len(Context._fields), 9, 8, 7)
    channels[:, [0, 2]] = -1
    assert Context.of(channels).modes().tolist() == [MODES.index("unconditional")] * 2
    with torch.no_grad():
        assert torch.equal(network(x), network(x, torch.tensor([999, 999]), channels))


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="num_labels: background and at least one label are needed, got 1"):
        StructDiffUNet(num_labels=1)


def test_state_dict_keeps_table_and_velocity(network):
    copy = make_network(seed=7)
    copy.load_state_dict(network.state_dict())
    assert torch.equal(copy.moments.table, network.moments.table)
    assert copy.moments.measured
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    with torch.no_grad():
        assert torch.equal(copy(x, t, context), network(x, t, context))


def test_amp_in_bf16_stays_close_and_returns_float32(network):
    emulated = make_network(amp=True)
    emulated.load_state_dict(network.state_dict())
    x, t, context = noise(1, 1, 8, 8, 8), torch.tensor([300]), make_context((8, 8, 8))
    with torch.no_grad():
        half, full = emulated(x, t, context), network(x, t, context)
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
    network = StructDiffUNet(num_labels=11, channels=(32, 64, 96))
    assert sum(p.numel() for p in network.parameters()) < 6.2e6


# Correspondence attention: eight blocks of 8^3 voxels, each with a label and an intensity of its own.
BLOCKS = 8
SHUFFLED = [3, 7, 0, 5, 2, 6, 1, 4]


def block_volume(values):
    return F.interpolate(torch.tensor(values, dtype=torch.float32).view(1, 1, 2, 2, 2), scale_factor=8, mode="nearest")


def block_context(template_labels, template_values):
    context = blank_context((16, 16, 16))
    context[:, :1] = block_volume(range(BLOCKS))
    context[:, 1:2] = block_volume(template_values)
    context[:, 2:3] = block_volume(template_labels)
    return Context.of(context)


def consistency(attention, context, image):
    return two_way_consistency(attention.affinity(context), context.template_image_hu, image)


def label_attention(sharpness):
    """Mask tokens are one-hot labels times `sharpness`, positions are ignored."""
    attention = CorrespondenceAttention(BLOCKS, BLOCKS)
    for parameter in attention.mask_encoder.parameters():
        torch.nn.init.zeros_(parameter)
    for label in range(BLOCKS):
        attention.mask_encoder[0].weight.data[label, label, 1, 1, 1] = sharpness
        attention.mask_encoder[2].weight.data[label, label] = 1.0
    return attention


VALUES = [-400.0, -250.0, -100.0, 0.0, 50.0, 180.0, 300.0, 450.0]


def test_sharp_attention_carries_intensities_by_label_wherever_the_template_has_them():
    context = block_context(SHUFFLED, [VALUES[i] for i in SHUFFLED])
    attention = label_attention(20.0)
    assert consistency(attention, context, block_volume(VALUES)) < 1e-6
    aligned = block_context(range(BLOCKS), VALUES)
    taps = attention.image_encoder[0].weight.data
    centre = taps[..., 1, 1, 1].clone()
    taps.zero_()
    taps[..., 1, 1, 1] = centre  # without neighbours, or moving blocks changes their features
    torch.testing.assert_close(attention(context)[0], attention(aligned)[0])
    assert attention(aligned)[0].flatten(2).std(2).max() > 0.01


def test_sharp_attention_notices_intensities_on_the_wrong_label():
    shifted = block_context(range(BLOCKS), [VALUES[i] for i in SHUFFLED])
    wrong = torch.tensor([(VALUES[i] - VALUES[SHUFFLED[i]]) / 500 for i in range(BLOCKS)]).square().mean()
    torch.testing.assert_close(consistency(label_attention(20.0), shifted, block_volume(VALUES)), 2 * wrong)


def test_blind_attention_is_off_by_twice_the_variance():
    """Equal logits carry the mean of the other volume everywhere."""
    context = block_context(range(BLOCKS), VALUES)
    variance = (torch.tensor(VALUES) / 500).var(unbiased=False)
    torch.testing.assert_close(consistency(label_attention(0.0), context, block_volume(VALUES)), 2 * variance)


def test_consistency_teaches_the_mask_encoder():
    torch.manual_seed(0)
    attention = CorrespondenceAttention(BLOCKS, 8)
    context = block_context(SHUFFLED, [VALUES[i] for i in SHUFFLED])
    before = consistency(attention, context, block_volume(VALUES))
    optimizer = torch.optim.Adam(attention.mask_encoder.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = consistency(attention, context, block_volume(VALUES))
        loss.backward()
        assert all(p.grad.isfinite().all() for p in attention.mask_encoder.parameters())
        optimizer.step()
    assert loss < 0.2 * before


def test_padding_of_the_context_is_what_encode_does(network):
    context = make_context((10, 8, 13))
    whole, padded = network.encode(context), network.encode(pad_to_multiple(context, network.size_multiple))
    for name, part in whole._asdict().items():
        assert torch.equal(part, getattr(padded, name)), name
        assert part.shape[2:] == (8, 4, 8), name


@pytest.mark.parametrize("correspondence_channels", [0, 8])
def test_torchscript_gives_the_same_velocity_at_every_size_and_in_every_mode(correspondence_channels, tmp_path):
    network = shaken(make_network(correspondence_channels))
    network.moments.set_table(varied_table())
    torch.jit.save(torch.jit.script(network), tmp_path / "network.ts")
    loaded = torch.jit.load(tmp_path / "network.ts")
    for size, batch in zip(SIZES, (1, 2, 3), strict=True):
        image, timesteps = noise(batch, 1, *size), torch.arange(batch) * 300 + 100
        context = make_context(size, batch)
        mask_only = context.clone()
        mask_only[:, 1], mask_only[:, 2], mask_only[:, 4:] = 0.0, -1.0, 0.0
        unconditional = mask_only.clone()
        unconditional[:, 0] = -1.0
        for mode in (context, mask_only, unconditional):
            with torch.no_grad():
                expected = network(image, timesteps, mode)
                torch.testing.assert_close(loaded(image, timesteps, mode), expected, rtol=1e-4, atol=1e-4)
            assert expected.std() > 0.01
