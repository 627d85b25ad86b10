"""Deformations against closed forms and MONAI."""

import numpy as np
import pytest
import torch
from custom.geometry.deformation import (
    compose,
    exponentiate,
    identity_coordinates,
    jacobian_determinant,
    random_velocity,
    sample,
    sample_labels,
    warp,
)
from monai.networks.blocks import DVF2DDF

SHAPE = (24, 28, 20)
SPACING = (1.5, 1.0, 2.5)
INTERIOR = (..., slice(4, -4), slice(4, -4), slice(4, -4))


@pytest.fixture(autouse=True)
def _same_random_volumes():
    torch.manual_seed(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def velocity(amplitude_mm=3.0, seed=0, shape=SHAPE, spacing_mm=SPACING, sigma_mm=8.0, batch=1):
    return random_velocity(
        shape, spacing_mm=spacing_mm, sigma_mm=sigma_mm, amplitude_mm=amplitude_mm, generator=seeded(seed), batch=batch
    )


def smooth_volume(shape=SHAPE, batch=1):
    return exponentiate(velocity(shape=shape, batch=batch, amplitude_mm=10.0, seed=9))[:, :2]


# Reading and warping


def test_identity_coordinates_read_the_volume_unchanged():
    volume = torch.rand(2, 3, *SHAPE)
    torch.testing.assert_close(sample(volume, identity_coordinates(SHAPE)), volume, atol=1e-4, rtol=0)
    torch.testing.assert_close(sample(volume, identity_coordinates(SHAPE), mode="nearest"), volume)
    torch.testing.assert_close(warp(volume, torch.zeros(1, 3, *SHAPE)), volume, atol=1e-4, rtol=0)


def test_coordinates_follow_the_axes_h_w_d():
    volume = identity_coordinates(SHAPE)
    shift = torch.tensor([1.5, -2.0, 0.25]).view(1, 3, 1, 1, 1)
    moved = warp(volume, shift.expand(1, 3, *SHAPE))
    torch.testing.assert_close((moved - volume - shift)[INTERIOR], torch.zeros_like(volume[INTERIOR]))


def test_whole_voxel_shift_pulls_back():
    volume = torch.rand(1, 1, *SHAPE)
    shift = torch.tensor([2.0, 0.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    torch.testing.assert_close(warp(volume, shift)[..., :-2, :, 1:], volume[..., 2:, :, :-1], atol=1e-4, rtol=0)


def test_outside_reads_the_border():
    volume = torch.rand(1, 1, *SHAPE)
    far = torch.full((1, 3, 1, 1, 1), 1000.0)
    assert sample(volume, far).item() == pytest.approx(volume[0, 0, -1, -1, -1].item())
    assert sample(volume, -far).item() == pytest.approx(volume[0, 0, 0, 0, 0].item())


def test_sample_gives_the_shape_of_the_coordinates_also_on_one_slice():
    assert sample(torch.rand(2, 4, 5, 6, 7), torch.zeros(1, 3, 8, 9, 3)).shape == (2, 4, 8, 9, 3)
    assert sample(torch.ones(1, 1, 1, 6, 7), torch.zeros(1, 3, 2, 2, 2)).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_keeps_the_dtype(dtype, mode):
    volume = (10 * torch.rand(1, 1, *SHAPE)).to(dtype)
    warped = warp(volume, torch.zeros(1, 3, *SHAPE), mode=mode)
    assert warped.dtype == dtype
    torch.testing.assert_close(warped.double(), volume.double(), atol=1e-2 if dtype == torch.float16 else 1e-4, rtol=0)


def test_one_interpolation_of_noise_loses_less_than_two():
    noise = torch.randn(1, 1, *SHAPE, generator=seeded())
    half = torch.full((1, 3, *SHAPE), 0.5)
    assert warp(noise, compose(half, half))[INTERIOR].std() > 0.95
    assert warp(warp(noise, half), half)[INTERIOR].std() < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)), "volume must be"),
        ((torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4)), "displacement must be"),
        ((torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 5)), "must be on the grid"),
        ((torch.rand(3, 1, 4, 4, 4), torch.zeros(2, 3, 4, 4, 4)), "batch size 1 or 3"),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        warp(*arguments)


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be 'bilinear' or 'nearest', got 'cubic'"):
        warp(torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4), mode="cubic")


# Label maps


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_read_at_their_own_place_are_unchanged(dtype):
    labels = torch.randint(0, 5, (2, 1, *SHAPE), generator=seeded()).to(dtype)
    read = sample_labels(labels, identity_coordinates(SHAPE))
    assert read.dtype == labels.dtype
    assert torch.equal(read, labels)


def test_the_label_of_most_linear_weight_wins():
    labels = torch.randint(0, 4, (1, 1, *SHAPE), generator=seeded())
    field = exponentiate(velocity())
    one_hot = torch.cat([(labels == n).float() for n in range(4)], 1)
    read = sample_labels(labels, identity_coordinates(SHAPE) + field)
    assert torch.equal(read, warp(one_hot, field).argmax(1, keepdim=True))


def test_labels_of_an_empty_map_are_empty():
    assert not sample_labels(torch.zeros(1, 1, *SHAPE, dtype=torch.long), identity_coordinates(SHAPE)).any()


def test_labels_are_read_on_the_grid_of_the_coordinates_for_each_item():
    labels = torch.arange(4).view(2, 1, 1, 2, 1).expand(2, 1, 4, 2, 4)
    axes = (torch.arange(3.0), torch.tensor([0.0, 0.4, 0.6, 9.0]), torch.ones(2))
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    expected = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]).view(2, 1, 1, 4, 1).expand(2, 1, 3, 4, 2)
    assert torch.equal(sample_labels(labels, where), expected)


def test_half_way_between_two_labels_the_lower_id_is_read():
    labels = torch.tensor([7, 2]).view(1, 1, 2, 1, 1)
    where = torch.zeros(1, 3, 3, 1, 1)
    where[0, 0, :, 0, 0] = torch.tensor([0.0, 0.5, 1.0])
    assert sample_labels(labels, where).flatten().tolist() == [7, 2, 2]


def test_label_maps_of_more_channels_are_refused():
    with pytest.raises(ValueError, match=r"label_map must be \(B, 1, H, W, D\)"):
        sample_labels(torch.zeros(1, 2, *SHAPE), identity_coordinates(SHAPE))


# Random velocities


@pytest.mark.parametrize("sigma_mm", [4.0, 12.0, 60.0])
@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 1.5), SPACING])
def test_amplitude_is_in_mm_on_any_spacing(sigma_mm, spacing_mm):
    field_mm = velocity(5.0, sigma_mm=sigma_mm, spacing_mm=spacing_mm, batch=2) * torch.tensor(spacing_mm).view(
        1, 3, 1, 1, 1
    )
    rms = field_mm.square().sum(1).mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full((2,), 5.0))


def test_correlation_follows_its_closed_form_along_every_axis():
    sigma_mm = 6.0
    field = velocity(shape=(64, 96, 40), sigma_mm=sigma_mm, batch=6)
    for axis, step_mm in zip((2, 3, 4), SPACING, strict=True):
        for lag in (2, 4):
            count = field.shape[axis] - lag
            a, b = field.narrow(axis, 0, count), field.narrow(axis, lag, count)
            measured = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
            expected = np.exp(-((lag * step_mm) ** 2) / (2 * sigma_mm**2))
            assert measured.item() == pytest.approx(expected, abs=0.06)


def test_field_is_as_strong_at_the_border_as_inside():
    field = velocity(shape=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0), sigma_mm=4.0, batch=200)
    variance = field.square().mean((0, 1))
    assert variance[0].mean() / variance[8].mean() == pytest.approx(1.0, abs=0.1)


def test_generator_decides_the_field_and_batch_does_not():
    torch.manual_seed(1)
    one = velocity(seed=3)
    torch.manual_seed(2)
    assert torch.equal(one, velocity(seed=3))
    assert torch.equal(one[0], velocity(seed=3, batch=3)[0])
    assert not torch.equal(one, velocity(seed=4))


def test_zero_amplitude_is_no_velocity():
    assert not velocity(amplitude_mm=0.0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_mm": 1.0}, "sigma_mm must be at least the voxel size 2.5 mm, got 1.0"),
        ({"amplitude_mm": -1.0}, "amplitude_mm must not be negative, got -1.0"),
        ({"spacing_mm": (1.0, 1.0)}, "spacing_mm must be three positive lengths"),
        ({"shape": (4, 4)}, "shape must be three positive sizes"),
    ],
)
def test_random_velocity_names_the_wrong_argument(change, message):
    with pytest.raises(ValueError, match=message):
        velocity(**change)


# Exponential, composition, Jacobian


def test_exponential_of_a_constant_is_a_translation():
    constant = torch.tensor([1.25, -0.5, 3.0]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    torch.testing.assert_close(exponentiate(constant), constant)


def test_exponential_of_a_linear_field_is_the_matrix_exponential():
    A = torch.tensor([[0.05, -0.2, 0.0], [0.2, 0.05, 0.1], [0.0, -0.1, -0.1]])
    shape = (41, 41, 41)
    x = identity_coordinates(shape) - 20
    flow = exponentiate((A @ x.flatten(2)).view_as(x), steps=10)
    expected = ((torch.linalg.matrix_exp(A) - torch.eye(3)) @ x.flatten(2)).view_as(x)
    inner = (..., slice(12, -12), slice(12, -12), slice(12, -12))
    torch.testing.assert_close(flow[inner], expected[inner], atol=2e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
def test_exponential_agrees_with_monai():
    field = velocity(batch=2)
    torch.testing.assert_close(
        exponentiate(field, 5), DVF2DDF(num_steps=5, padding_mode="border")(field), atol=1e-4, rtol=0
    )


def test_exponential_of_minus_v_is_the_inverse():
    shape = (40, 40, 40)
    field = velocity(6.0, shape=shape, spacing_mm=(1.5, 1.5, 1.5), sigma_mm=12.0)
    there, back = exponentiate(field), exponentiate(-field)
    for error in (compose(there, back), compose(back, there)):
        inner = error[..., 8:-8, 8:-8, 8:-8]
        assert inner.norm(dim=1).max() < 0.3
        assert inner.norm(dim=1).mean() < 0.1
        assert there[..., 8:-8, 8:-8, 8:-8].norm(dim=1).max() > 3.0


def test_composition_does_the_first_first():
    volume = smooth_volume()
    first, second = exponentiate(velocity(seed=1)), exponentiate(velocity(seed=2))
    twice = warp(warp(volume, first), second)
    error = (warp(volume, compose(first, second)) - twice)[INTERIOR].abs().mean()
    swapped = (warp(volume, compose(second, first)) - twice)[INTERIOR].abs().mean()
    assert error < 0.25 * swapped


def test_jacobian_of_the_identity_is_one():
    det = jacobian_determinant(torch.zeros(2, 3, *SHAPE))
    assert det.shape == (2, 1, *SHAPE)
    assert det.eq(1).all()


def test_jacobian_of_an_affine_map_is_its_determinant():
    A = torch.tensor([[0.1, -0.2, 0.0], [0.3, -0.1, 0.1], [0.0, -0.1, 0.2]])
    x = identity_coordinates(SHAPE)
    det = jacobian_determinant((A @ x.flatten(2)).view_as(x))
    torch.testing.assert_close(det, torch.linalg.det(torch.eye(3) + A).expand_as(det), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_moderate_fields_do_not_fold(seed):
    field = velocity(5.0, seed=seed, shape=(48, 48, 48), spacing_mm=(1.5, 1.5, 1.5), sigma_mm=12.0)
    assert jacobian_determinant(exponentiate(field)).min() > 0.1
    assert jacobian_determinant(4 * field).min() < 0  # without the exponential, a strong field does fold


def test_exponentiate_names_its_steps():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        exponentiate(velocity(), 0)
