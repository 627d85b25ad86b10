"""The formulas of the diffusion against algebra and closed forms."""

import math

import pytest
import torch
from custom.diffusion.formulas import amplitudes, angle_step, probability_flow


def test_amplitudes_are_a_unit_vector_per_sample():
    alphas = torch.linspace(0.999, 0.001, 10)
    a, s = amplitudes(alphas, torch.tensor([0, 9, 4]), 5)
    assert a.shape == s.shape == (3, 1, 1, 1, 1)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))
    torch.testing.assert_close(a.flatten() ** 2, alphas[[0, 9, 4]])


def test_angle_step_is_second_order_on_a_rotation():
    """dy/dpsi of a point on the unit circle is its tangent: halving the step divides the final error by about four."""

    def error(steps):
        psi = torch.linspace(torch.pi / 2, 0, steps + 1, dtype=torch.float64)
        y, previous = torch.cos(psi[0]) * 0.7 + torch.sin(psi[0]) * 0.2, None
        for now, following in zip(psi[:-1], psi[1:], strict=True):
            f = -torch.sin(now) * 0.7 + torch.cos(now) * 0.2
            y, previous = angle_step(y, f, following - now, previous), (f, following - now)
        return abs(float(y) - 0.7)

    assert 3.3 < error(20) / error(40) < 4.7
    assert error(40) < 1e-3


@pytest.mark.parametrize("steps", [[0.3, 0.7, 0.5], [1.5], [0.01, 1.0, 0.4]])
def test_a_constant_change_is_followed_exactly_by_steps_of_any_length(steps):
    y, previous, f = torch.tensor(2.0, dtype=torch.float64), None, torch.tensor(-3.0, dtype=torch.float64)
    for step in steps:
        y, previous = angle_step(y, f, torch.tensor(-step), previous), (f, torch.tensor(-step))
    assert float(y) == pytest.approx(2 + 3 * sum(steps), rel=1e-6)


def test_a_change_that_grows_evenly_is_followed_exactly_after_the_first_step():
    """dy/dpsi = psi, so y gains (b^2 - a^2) / 2 between a and b, whatever the two lengths."""
    f = [torch.tensor(angle, dtype=torch.float64) for angle in (1.5, 1.1)]
    y = angle_step(torch.zeros((), dtype=torch.float64), f[1], torch.tensor(-0.9), (f[0], torch.tensor(-0.4)))
    assert float(y) == pytest.approx((0.2**2 - 1.1**2) / 2, rel=1e-6)


def test_without_a_change_a_sample_stays_as_it_is():
    y = torch.randn(2, 8, 3, 3, 3)
    assert torch.equal(angle_step(y, torch.zeros_like(y), torch.tensor(-math.pi / 2), None), y)


@pytest.mark.parametrize("sd", [0.05, 1.0, 2.5])
def test_the_flow_ends_at_what_the_velocity_points_to_whatever_its_deviation(sd):
    """All data at one place: the velocity follows from the sample, and the flow must end there."""
    alphas, place = torch.linspace(0.9999, 1e-6, 1000, dtype=torch.float64), 0.7

    def flow(y, times):
        angle = torch.atan2((1 - alphas[times]).sqrt(), sd * alphas[times].sqrt())[:, None]
        eps = (y - angle.cos() * place) / angle.sin()
        return angle.cos() * eps - angle.sin() * place

    y = torch.full((1, 1), 1.3, dtype=torch.float64)
    times = torch.linspace(999, 0, 41).round().long().tolist()[:-1]
    assert probability_flow(y, flow, alphas, times, sd=sd).item() == pytest.approx(place, abs=0.05)
