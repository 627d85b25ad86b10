"""The network: exact where a closed form exists, invariant where it must be, loud where the input is wrong."""

import pytest
import torch
from torch.nn import functional as F

from custom.diffusion import amplitudes, pad_to_multiple, precondition
from custom.networks import (
    CONTEXT_CHANNELS,
    MODES,
    REGIONS,
    CorrespondenceAttention,
    StructDiffUNet,
    context_modes,
    one_hot_blocks,
    output_scale,
    residual_regions,
    residual_unit,
)

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
    sd = 10 + 30 * torch.rand(batch, len(CONTEXT_CHANNELS) - 4, *size, generator=generator)
    return torch.cat([labels[:, :1], images[:, :1], labels[:, 1:], images[:, 1:], sd], 1)


def blank_context(size, batch=1):
    """Background only, everything at 0 HU, and spreads of 100 HU: the residual unit is 1 everywhere."""
    context = torch.zeros(batch, len(CONTEXT_CHANNELS), *size)
    context[:, 4:] = 100.0
    return context


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    network = shaken(make_network())
    network.set_residual_sigma(0.1 + noise(len(MODES), len(REGIONS), 8).abs())
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
    network.set_residual_sigma(torch.full_like(network.residual_sigma, sigma))
    x, timesteps = noise(2, 1, 12, 9, 14), torch.tensor([50, 800])
    with torch.no_grad():
        velocity = network(x, timesteps, blank_context((12, 9, 14), 2))
    alpha = network.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    expected = (alpha * (1 - alpha)).sqrt() * (1 - sigma**2) / (alpha * sigma**2 + 1 - alpha) * x
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-6)


def test_sigma_table_acts_band_by_band():
    """A table that is 1 but for the low-pass band: block means follow sigma, details are plain v-prediction (zero)."""
    network = make_network()
    table = torch.ones_like(network.residual_sigma)
    table[..., 0] = 0.1
    network.set_residual_sigma(table)
    x, t = noise(1, 1, 8, 8, 8), torch.tensor([400])
    with torch.no_grad():
        velocity = network(x, t, blank_context((8, 8, 8)))
    a, s = amplitudes(network.alphas_cumprod, t, 5)
    means = F.interpolate(F.avg_pool3d(x, 2), scale_factor=2, mode="nearest")
    torch.testing.assert_close(velocity, precondition(a, s, torch.tensor(0.1))[1] * means, rtol=1e-5, atol=1e-6)


def test_forward_is_denoise_of_encode(network):
    x, timesteps, context = noise(2, 1, 10, 16, 8), torch.tensor([10, 500]), make_context((10, 16, 8), 2)
    with torch.no_grad():
        assert torch.equal(network(x, timesteps, context), network.denoise(x, timesteps, network.encode(context)))


@pytest.mark.parametrize("correspondence_channels", [0, 8])
def test_a_sample_does_not_depend_on_its_batch(correspondence_channels):
    network = shaken(make_network(correspondence_channels))
    network.set_residual_sigma(0.1 + noise(len(MODES), len(REGIONS), 8).abs())
    x, timesteps, context = noise(3, 1, 16, 9, 12), torch.tensor([10, 500, 990]), make_context((16, 9, 12), 3)
    context[1, 2], context[1, 1] = -1, 0
    context[2, :3], context[2, 1] = -1, 0
    with torch.no_grad():
        together = network(x, timesteps, context)
        alone = torch.cat([network(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("correspondence_channels", [0, 8])
def test_gradients_reach_every_parameter(correspondence_channels):
    network = shaken(make_network(correspondence_channels)).train()
    velocity = network(noise(2, 1, 16, 16, 16), torch.tensor([100, 600]), make_context((16, 16, 16), 2))
    (velocity - noise(*velocity.shape, seed=9)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("channel", range(len(CONTEXT_CHANNELS)), ids=CONTEXT_CHANNELS)
def test_every_context_channel_changes_the_velocity(network, channel):
    context = make_context((8, 8, 8))
    other = context.clone()
    other[:, channel] = make_context((8, 8, 8), seed=5)[:, channel]
    x, t = noise(1, 1, 8, 8, 8), torch.tensor([300])
    with torch.no_grad():
        assert (network(x, t, context) - network(x, t, other)).abs().max() > 1e-3


def test_dropped_label_maps_select_the_mode():
    context = blank_context((4, 4, 4), 4)  # background only, but present
    context[1, 2] = -1
    context[2, 0] = context[2, 2] = -1
    context[3, 0, 0, 0, 0] = 3
    context[3, 2] = -1
    assert [MODES[i] for i in context_modes(context)] == ["template", "mask_only", "unconditional", "mask_only"]


def test_modes_and_regions_read_their_own_row_of_sigma():
    network = make_network()
    table = torch.arange(1.0, 1 + network.residual_sigma.numel()).view_as(network.residual_sigma)
    network.set_residual_sigma(table)
    context = blank_context((8, 8, 8), 2)
    context[1, 2] = -1  # mask only
    context[:, 3, :4] = -900.0  # lung in the first half
    sigma = network.sigma_map(context)
    assert sigma.shape == (2, 8, 4, 4, 4)
    for sample, mode in ((0, "template"), (1, "mask_only")):
        for row, region in ((0, "lung"), (3, "soft_background")):
            expected = table[MODES.index(mode), REGIONS.index(region)]
            assert torch.equal(sigma[sample, :, row, 1, 2], expected)


def test_regions_of_a_cube():
    """Cube of label 1 at voxels 4 to 11: its face neighbours, voxels 3 and 12, are edge too; lung from voxel 16 on."""
    label, prior = torch.zeros(1, 1, 16, 16, 24), torch.zeros(1, 1, 16, 16, 24)
    label[..., 4:12, 4:12, 4:12] = 1
    prior[..., 16:] = -900.0
    region = residual_regions(label, prior)
    assert region.shape == (1, 8, 8, 12)
    expected = torch.zeros(8, 8, 12, dtype=torch.long)
    expected[..., 9:] = REGIONS.index("lung")
    expected[..., 7:9] = REGIONS.index("background_edge")
    for axis in range(3):
        grown = [slice(2, 6)] * 3
        grown[axis] = slice(1, 7)
        expected[tuple(grown)] = REGIONS.index("label_edge")
    expected[3:5, 3:5, 3:5] = REGIONS.index("interior")
    assert torch.equal(region[0], expected)


@pytest.mark.parametrize(("step_hu", "region"), [(99.0, "soft_background"), (101.0, "background_edge")])
def test_background_edges_begin_at_a_hundred_hu(step_hu, region):
    prior = torch.zeros(1, 1, 8, 2, 2)
    prior[:, :, 4:] = step_hu
    regions = residual_regions(torch.zeros_like(prior), prior)[0, :, 0, 0]
    assert [REGIONS[i] for i in regions] == ["soft_background", region, region, "soft_background"]


def test_unit_is_the_label_spread_for_means_and_the_grain_for_details():
    context = blank_context((8, 2, 2))
    context[:, 4], context[:, 5] = 40.0, 25.0
    context[:, 5, 2:] = 1.0  # grain below 5 HU counts as 5
    region = torch.tensor([0, 2, REGIONS.index("label_edge"), REGIONS.index("background_edge")]).view(1, 4, 1, 1)
    unit = residual_unit(context, region)[0, :, :, 0, 0]
    assert unit.shape == (8, 4)
    torch.testing.assert_close(unit[0], torch.tensor([0.4, 0.4, 1.0, 1.0]))
    torch.testing.assert_close(unit[1:], torch.tensor([0.25, 0.05, 1.0, 1.0]).expand(7, -1))


def test_unmeasured_network_has_unit_sigma_whatever_the_context():
    network, context = make_network(), blank_context((8, 8, 8))
    context[:, 4:] = 30.0
    assert torch.equal(network.sigma_map(context), torch.ones(1, 8, 4, 4, 4))
    network.set_residual_sigma(torch.ones_like(network.residual_sigma))
    torch.testing.assert_close(network.sigma_map(context), torch.full((1, 8, 4, 4, 4), 0.3))


def test_boundary_between_two_labels_is_edge():
    label = torch.ones(1, 1, 8, 4, 4)
    label[:, :, 4:] = 2
    region = residual_regions(label, torch.zeros_like(label))
    assert [REGIONS[i] for i in region[0, :, 0, 0]] == ["interior", "label_edge", "label_edge", "interior"]


def test_a_dropped_mask_has_no_edges():
    label = torch.full((1, 1, 4, 4, 4), -1.0)
    assert [REGIONS[i] for i in residual_regions(label, torch.zeros_like(label)).unique()] == ["soft_background"]


def test_one_hot_blocks_leave_out_unknown_ids():
    label = torch.tensor([-1.0, 0, 1, 2, 3, 4, 2.0001, 0.9999]).reshape(1, 1, 2, 2, 2)
    blocks = one_hot_blocks(label, NUM_LABELS).reshape(NUM_LABELS, 8)
    expected = torch.tensor([[-1, 0, 1, 2, 3, 4, 2, 1]]) == torch.arange(NUM_LABELS)[:, None]
    assert torch.equal(blocks, expected.float())


def test_output_scale_is_the_posterior_deviation_of_each_band():
    network = make_network()
    table = 0.1 + noise(len(MODES), len(REGIONS), 8).abs()
    network.set_residual_sigma(table)
    context, t = blank_context((7, 8, 8)), torch.tensor([600])
    scale = output_scale(network, context, t)
    assert scale.shape == (1, 8, 4, 4, 4)
    alpha = network.alphas_cumprod[600]
    sigma = table[MODES.index("template"), REGIONS.index("soft_background")]
    torch.testing.assert_close(scale[0, :, 1, 2, 3], sigma / (alpha * sigma**2 + 1 - alpha).sqrt())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_sigma_is_refused_and_leaves_the_old_one(value):
    network = make_network()
    sigma = torch.ones_like(network.residual_sigma)
    sigma[0, 1, 2] = value
    with pytest.raises(ValueError, match="sigma: must be finite, positive and shaped"):
        network.set_residual_sigma(sigma)
    assert torch.equal(network.residual_sigma, torch.ones(len(MODES), len(REGIONS), 8))


@pytest.mark.parametrize("shape", [(3, 2), (8,), (1, 3, 5, 8)])
def test_sigma_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"sigma: must be finite, positive and shaped \(3, 5, 8\), got") as error:
        make_network().set_residual_sigma(torch.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8, 8), (6, 8, 8, 8), (1, 7, 8, 8, 8)])
def test_malformed_context_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"context: must be \(B, 6, H, W, D\) with channels .*prior_hu.* got") as error:
        network.encode(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8, 8), (1, 1, 8, 8, 6)])
def test_x_must_fit_the_context(network, shape):
    with pytest.raises(ValueError, match="x .* and context .*: batch and spatial sizes must agree"):
        network(torch.zeros(shape), torch.tensor([3]), blank_context((8, 8, 8)))


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="num_labels: background and at least one label are needed, got 1"):
        StructDiffUNet(num_labels=1)


def test_state_dict_keeps_sigma_and_velocity(network):
    copy = make_network(seed=7)
    copy.load_state_dict(network.state_dict())
    assert torch.equal(copy.residual_sigma, network.residual_sigma)
    assert copy.measured
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
    return context


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
    assert attention.consistency(context, block_volume(VALUES)) < 1e-6
    aligned = block_context(range(BLOCKS), VALUES)
    taps = attention.image_encoder[0].weight.data
    centre = taps[..., 1, 1, 1].clone()
    taps.zero_()
    taps[..., 1, 1, 1] = centre  # without neighbours, or moving blocks changes their features
    torch.testing.assert_close(attention(context), attention(aligned))
    assert attention(aligned).flatten(2).std(2).max() > 0.01


def test_sharp_attention_notices_intensities_on_the_wrong_label():
    shifted = block_context(range(BLOCKS), [VALUES[i] for i in SHUFFLED])
    wrong = torch.tensor([(VALUES[i] - VALUES[SHUFFLED[i]]) / 500 for i in range(BLOCKS)]).square().mean()
    torch.testing.assert_close(label_attention(20.0).consistency(shifted, block_volume(VALUES)), 2 * wrong)


def test_blind_attention_is_off_by_twice_the_variance():
    """Equal logits carry the mean of the other volume everywhere."""
    context = block_context(range(BLOCKS), VALUES)
    variance = (torch.tensor(VALUES) / 500).var(unbiased=False)
    torch.testing.assert_close(label_attention(0.0).consistency(context, block_volume(VALUES)), 2 * variance)


def test_consistency_teaches_the_mask_encoder():
    torch.manual_seed(0)
    attention = CorrespondenceAttention(BLOCKS, 8)
    context = block_context(SHUFFLED, [VALUES[i] for i in SHUFFLED])
    before = attention.consistency(context, block_volume(VALUES))
    optimizer = torch.optim.Adam(attention.mask_encoder.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = attention.consistency(context, block_volume(VALUES))
        loss.backward()
        assert all(p.grad.isfinite().all() for p in attention.mask_encoder.parameters())
        optimizer.step()
    assert loss < 0.2 * before


def test_padding_of_the_context_is_what_encode_does(network):
    context = make_context((10, 8, 13))
    whole, padded = network.encode(context), network.encode(pad_to_multiple(context, network.size_multiple))
    assert torch.equal(whole.features, padded.features)
    assert torch.equal(whole.sigma, padded.sigma)
