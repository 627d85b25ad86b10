"""The coarse stage: what 6 mm hold, what it is told, and that its drawings depend on seed and case alone."""

import pytest
import torch
from custom.diffusion.coarse import (
    CELL_MM,
    CoarseUNet,
    cells_over,
    cells_within,
    coarse_context,
    coarsened,
    low_pass,
    refined,
)
from custom.diffusion.coarse_transforms import Coarsend, DrawCoarsed, RandCoarsePaird, Surroundingsd
from custom.diffusion.formulas import amplitudes
from custom.diffusion.schedule import spaced_timesteps
from custom.diffusion.transforms import PaintPriord
from custom.volumes.haar import haar_pack, haar_unpack
from custom.volumes.intensity import label_statistics
from monai.data import MetaTensor

NOMINAL_HU = [-60.0, 100.0, 400.0]
SPACING_MM = [2.0, 2.0, 2.0]
SIZE = (72, 68, 70)
AFFINE = torch.diag(torch.tensor([*SPACING_MM, 1.0], dtype=torch.float64))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_item(size=SIZE):
    label = torch.zeros(1, *size)
    label[:, 20:50, 22:48, 18:52] = 1
    label[:, 28:42, 30:42, 26:40] = 2
    image = torch.tensor([-80.0, 130.0, 350.0])[label.long()]
    image[:, :8] = -850  # lung
    statistics = label_statistics(image, label, 3)
    volumes = {key: MetaTensor(v, affine=AFFINE) for key, v in (("image", image), ("label", label))}
    return {**volumes, "statistics": statistics, "case": "a"}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = CoarseUNet(channels=(8, 16)).eval()
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.05)
    return network


@pytest.mark.parametrize("spacing", [[0.8] * 3, [1.5] * 3, [2.0, 1.0, 3.0]])
def test_a_low_pass_image_survives_the_coarse_grid(spacing):
    size = tuple(round(150 / s) for s in spacing)
    smooth = 2000 * low_pass(low_pass(noise(1, 1, *size), spacing), spacing)
    cells = cells_over(size, spacing)
    back = refined(coarsened(smooth, spacing, cells), size, spacing)
    middle = [slice(n // 5, -(n // 5)) for n in size]
    error = (back - low_pass(smooth, spacing))[0, 0][tuple(middle)]
    assert error.square().mean().sqrt() < 0.05 * low_pass(smooth, spacing).std()


def test_a_constant_stays_constant_at_every_size():
    for size in [(17, 40, 9), (64, 64, 64)]:
        image = torch.full((1, 1, *size), 123.0)
        back = refined(coarsened(image, SPACING_MM, cells_over(size, SPACING_MM)), size, SPACING_MM)
        assert back.shape == image.shape
        assert torch.allclose(back, image, atol=1e-3)


def test_cells_cover_the_field_or_lie_within_it():
    size, spacing = (300, 100, 110), [0.8, 1.5, 2.0]
    over, within = cells_over(size, spacing), cells_within(size, spacing)
    for n, s, m, k in zip(size, spacing, over, within, strict=True):
        assert m % 8 == 0
        assert m * CELL_MM >= max(n * s, 192)
        assert k * CELL_MM <= n * s + 1e-3 < (k + 1) * CELL_MM + 1e-3


@pytest.mark.parametrize("size", [(32, 32, 32), (9, 14, 11)])
def test_velocity_has_the_shape_of_the_image_and_absent_means_unconditional_at_the_last_time(network, size):
    x = noise(2, 1, *size)
    last = torch.full((2,), 999)
    assert torch.equal(network(x), network(x, last, coarse_context(None, x)))
    assert network(x).shape == x.shape


def test_what_is_told_counts_and_telling_nothing_tells_nothing(network):
    shape = (1, 1, 16, 16, 16)
    x, painted, foreground = noise(*shape), 300 * noise(*shape, seed=1), noise(*shape, seed=2).sigmoid()
    told, nothing = coarse_context(painted, foreground), coarse_context(None, foreground)
    assert torch.equal(nothing, coarse_context(None, 1 - foreground))
    assert not torch.allclose(network(x, context=told), network(x, context=nothing))


def bands_and_angle(network, t):
    """Haar bands of z and of noise, with the signal and noise amplitudes of each at a time."""
    z, eps = noise(1, 8, 8, 8, 8) * network.band_sd, noise(1, 8, 8, 8, 8, seed=1)
    a, s = amplitudes(network.alphas_cumprod, torch.tensor([t]), 5)
    return z, eps, a, s, (a**2 * network.band_sd**2 + s**2).sqrt()


@pytest.mark.parametrize("t", [5, 300, 700, 990])
def test_a_flow_that_knows_every_band_is_the_velocity_of_the_image(network, monkeypatch, t):
    z, eps, a, s, sd = bands_and_angle(network, t)
    true = (a * network.band_sd * eps - s * z / network.band_sd) / sd

    def flow(y, timesteps, told):
        torch.testing.assert_close(y, (a * z + s * eps) / sd, atol=1e-4, rtol=1e-4)
        return true

    monkeypatch.setattr(network, "flow", flow)
    velocity = network(haar_unpack(a * z + s * eps), torch.tensor([t]))
    torch.testing.assert_close(velocity, haar_unpack(a * eps - s * z), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", [100, 500, 900])
def test_an_untrained_network_makes_the_best_linear_guess_of_each_band(t):
    network = CoarseUNet(channels=(8, 16)).eval()
    z, eps, a, s, _ = bands_and_angle(network, t)
    left = (haar_pack(network(haar_unpack(a * z + s * eps), torch.tensor([t]))) - (a * eps - s * z)).square().mean()
    for change in (-0.1, 0.1):
        worse = haar_pack(network(haar_unpack(a * z + s * eps), torch.tensor([t])))
        assert (worse + change * (a * z + s * eps) - (a * eps - s * z)).square().mean() > left


@pytest.mark.parametrize("steps", [2, 10])
def test_an_untrained_network_draws_noise_with_the_deviation_of_every_band(steps):
    network = CoarseUNet(channels=(8, 16)).eval()
    context = coarse_context(None, torch.zeros(1, 1, 32, 32, 32))
    drawn = network.draw(context, noise(1, 1, 32, 32, 32), spaced_timesteps(steps))
    spread = haar_pack((drawn + 250) / 450).std((0, 2, 3, 4)) / network.band_sd.flatten()
    assert (spread[1:] - 1).abs().max() < 0.15, "the coarse band is cut at -1024 HU"


def test_widths_that_no_head_fits_are_refused_by_the_option():
    with pytest.raises(ValueError, match=r"coarse_def#channels: .* the last one of 16, got \[16, 24\]"):
        CoarseUNet(channels=(16, 24))


def test_training_pairs_repeat_by_seed_and_their_paint_follows_the_shifted_labels():
    item = Coarsend(num_labels=3)(make_item((110, 108, 112)))
    still = {"scale": 0.0, "amplitude_mm": 0.0, "unconditional_prob": 0.0}

    def pair(seed, **options):
        transform = RandCoarsePaird(nominal_hu=NOMINAL_HU, roi_size=[32, 32, 32], **options)
        transform.set_random_state(seed=seed)
        return transform(item)

    first, again, other = pair(0), pair(0), pair(1)
    for key in ("image", "context"):
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], other[key])
    quiet = pair(0, **still, contrast_shift_hu=0.0, label_shift_hu=0.0)
    loud = pair(0, **still, contrast_shift_hu=200.0, label_shift_hu=50.0)
    change = (loud["image"] - quiet["image"]) * 450 - (loud["context"] - quiet["context"])[:1] * 500
    assert change.abs().max() < 0.5
    assert (loud["image"] - quiet["image"]).abs().max() > 0.1
    assert (pair(0, **still | {"unconditional_prob": 1.0})["context"][1] == -1).all()


def test_a_field_of_view_below_the_roi_is_refused_by_name():
    item = Coarsend(num_labels=3)(make_item())
    with pytest.raises(ValueError, match=r"smaller than the ROI of \[192.0, 192.0, 192.0\] mm; lower `roi_size`"):
        RandCoarsePaird(nominal_hu=NOMINAL_HU, roi_size=[32, 32, 32])(item)


def test_the_surroundings_of_a_scan_give_its_low_pass_image_back():
    item = make_item()
    item["surroundings"] = Surroundingsd(nominal_hu=NOMINAL_HU)(item)["surroundings"]
    drawn = PaintPriord(nominal_hu=NOMINAL_HU, mode="unconditional")(item)["prior"]
    wanted = low_pass(item["image"].as_tensor()[None], SPACING_MM)[0]
    assert (drawn.as_tensor() - wanted).square().mean().sqrt() < 12
    painted = PaintPriord(nominal_hu=NOMINAL_HU, mode="mask_only")(item)["prior"]
    chamber = item["label"] == 2
    assert abs(float((painted - item["image"])[chamber].mean())) < 15


@pytest.mark.parametrize("mode", ["mask_only", "unconditional"])
def test_what_is_drawn_depends_on_seed_and_case_and_on_the_mask_if_that_is_told(network, mode):
    def draw(item, seed=0):
        draws = DrawCoarsed(network, mode=mode, nominal_hu=NOMINAL_HU, timesteps=2, seed=seed)
        return PaintPriord(nominal_hu=NOMINAL_HU, mode=mode)(draws(item))["prior"].as_tensor()

    item = make_item()
    torch.manual_seed(1)
    first = draw(item)
    torch.manual_seed(2)
    assert torch.equal(first, draw(item))
    assert not torch.allclose(first, draw(item, seed=1))
    assert not torch.allclose(first, draw({**item, "case": "b"}))
    moved = {**item, "label": MetaTensor(item["label"].as_tensor().flip(1), affine=AFFINE)}
    assert torch.allclose(first, draw(moved), atol=0.01) == (mode == "unconditional")
