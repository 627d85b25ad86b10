"""Velocities of new anatomies: confined to the grid, the same for points and voxels, mixed as statistics say."""

import numpy as np
import pytest
import torch
from custom.geometry.deformation import exponentiate, identity_coordinates, random_velocity, sample
from custom.masks.motion import carry_points, confine, mixture_coefficients

SHAPE, SPACING = (28, 24, 30), (1.5, 1.0, 2.0)


def velocity(seed=0, amplitude_mm=4.0):
    generator = torch.Generator().manual_seed(seed)
    return random_velocity(SHAPE, spacing_mm=SPACING, sigma_mm=12.0, amplitude_mm=amplitude_mm, generator=generator)


def test_nothing_flows_through_the_faces_and_the_inside_is_kept():
    field = velocity()
    confined = confine(field, spacing_mm=SPACING, margin_mm=6.0)
    for axis in range(3):
        for face in (0, -1):
            assert confined[:, axis].select(axis + 1, face).abs().max() == 0
    inside = (slice(None), slice(None), slice(4, -4), slice(6, -6), slice(3, -3))  # 6 mm and more from every face
    assert torch.equal(confined[inside], field[inside])
    assert not torch.equal(confined[:, 0, 3:-3, 0], torch.zeros_like(confined[:, 0, 3:-3, 0]))  # along a face it moves


def test_a_confined_flow_maps_the_grid_onto_itself():
    displacement = exponentiate(confine(velocity(amplitude_mm=12.0), spacing_mm=SPACING, margin_mm=15.0))
    where = identity_coordinates(SHAPE) + displacement
    for axis, size in enumerate(SHAPE):
        assert where[:, axis].min() >= -1e-4
        assert where[:, axis].max() <= size - 1 + 1e-4


def test_fading_is_in_mm_along_each_axis():
    confined = confine(torch.ones(1, 3, 41, 41, 41), spacing_mm=(1.0, 2.0, 4.0), margin_mm=8.0)
    middle = [confined[0, 0, :9, 20, 20], confined[0, 1, 20, :5, 20], confined[0, 2, 20, 20, :3]]
    t = torch.arange(9) / 8
    expected = t * t * (3 - 2 * t)
    for axis, step in enumerate((1, 2, 4)):
        torch.testing.assert_close(middle[axis], expected[::step])


def test_points_go_where_the_voxels_go():
    field = confine(velocity(), spacing_mm=SPACING, margin_mm=6.0)
    points = torch.tensor([[9.0, 8.0, 11.0], [14.3, 12.1, 20.7], [20.0, 15.5, 6.2]])
    moved = carry_points(points, field)
    assert (moved - points).norm(dim=1).min() > 0.5
    where = identity_coordinates(SHAPE) + exponentiate(field)  # what the voxel at `moved` reads is `points`
    read = sample(where, moved.T[None, :, :, None, None])[0, :, :, 0, 0].T
    torch.testing.assert_close(read, points, atol=0.1, rtol=0)


def test_a_constant_velocity_moves_points_against_it():
    field = torch.zeros(1, 3, *SHAPE)
    field[:, 1] = 2.0
    points = torch.tensor([[5.0, 10.0, 5.0]])
    torch.testing.assert_close(carry_points(points, field), points - torch.tensor([[0.0, 2.0, 0.0]]))
    assert carry_points(torch.zeros(0, 3), field).shape == (0, 3)


def test_one_registration_gives_a_share_between_none_and_all():
    weights = torch.randn(1, 3, 2, 2, 2)
    shares = torch.cat([mixture_coefficients(weights, torch.Generator().manual_seed(i))[0] for i in range(200)])
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.06)


def test_mixtures_have_the_mean_and_covariance_of_their_samples():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, generator=generator)
    draws = [mixture_coefficients(weights, generator, max_z=9.0) for _ in range(20_000)]
    mixed = torch.stack([coefficients @ weights for coefficients, _ in draws]).double().numpy()
    samples = np.concatenate([np.zeros((1, 5)), weights.numpy()]).astype(float)  # the source itself does not move
    np.testing.assert_allclose(mixed.mean(0), samples.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(mixed.T), np.cov(samples.T), atol=0.06)


def test_registrations_that_depend_on_each_other_are_mixed_as_their_statistics_say():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 5, generator=generator).expand(3, -1)
    mixed = torch.stack([mixture_coefficients(weights, generator, max_z=9.0)[0].sum() for _ in range(5000)])
    samples = np.array([0.0, 1.0, 1.0, 1.0])  # shares of the one motion there is
    assert float(mixed.mean()) == pytest.approx(samples.mean(), abs=0.03)
    assert float(mixed.std()) == pytest.approx(samples.std(ddof=1), rel=0.05)


def test_z_is_limited_and_repeats_with_the_seed():
    weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    draws = [mixture_coefficients(weights, torch.Generator().manual_seed(i), max_z=0.5) for i in range(50)]
    z = torch.stack([z for _, z in draws])
    assert z.shape == (50, 4)
    assert z.abs().max() <= 0.5
    again = mixture_coefficients(weights, torch.Generator().manual_seed(7), max_z=0.5)
    assert torch.equal(again[0], draws[7][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confine(torch.zeros(1, 2, 4, 4, 4), spacing_mm=SPACING, margin_mm=1), r"velocity must be \(B, 3,"),
        (
            lambda: confine(torch.zeros(1, 3, 4, 4, 4), spacing_mm=SPACING, margin_mm=-1),
            r"must not be negative, got -1",
        ),
        (lambda: carry_points(torch.zeros(3), torch.zeros(1, 3, 4, 4, 4)), r"points must be \(N, 3\)"),
        (lambda: carry_points(torch.zeros(1, 3), torch.zeros(1, 3, 4, 4, 4), steps=0), r"steps must be at least 1"),
        (lambda: mixture_coefficients(torch.zeros(0, 3), torch.Generator()), r"at least one registration, got none"),
        (lambda: mixture_coefficients(torch.zeros(2, 3), torch.Generator(), max_z=0), r"max_z must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
