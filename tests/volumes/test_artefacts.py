"""Artefacts are where and as strong as they were drawn, and nowhere else."""

import numpy as np
import pytest
from custom.volumes.artefacts import SPOKES, add_plaque, add_streaks, blur_by_motion

SHAPE, SPACING_MM = (41, 37, 21), [1.0, 1.0, 2.0]


def image(hu=300.0):
    return np.full(SHAPE, hu, np.float32)


def radius_mm(centre_mm):
    axes = [(np.arange(n) - (n - 1) / 2) * s - c for n, s, c in zip(SHAPE, SPACING_MM, centre_mm, strict=True)]
    return np.sqrt(sum(a**2 for a in np.ix_(*axes)))


def test_a_plaque_is_a_ball_in_mm():
    hu, centre = image(), (3.0, -5.0, 4.0)
    add_plaque(hu, centre, radius_mm=4.0, plaque_hu=900.0, spacing_mm=SPACING_MM)
    away = radius_mm(centre)
    assert (hu[away < 3.4] == 900).all()
    assert (hu[away > 4.6] == 300).all()
    edge = hu[(away > 3.6) & (away < 4.4)]
    assert ((edge > 300) & (edge < 900)).all()


def test_streaks_are_spokes_in_the_plane_of_their_source():
    hu, source = image(0.0), (0.0, 0.0, 0.0)
    add_streaks(hu, source, phases=[0.0] * len(SPOKES), strength_hu=50.0, spacing_mm=SPACING_MM)
    middle = hu[:, :, 10]
    assert (middle[radius_mm(source)[:, :, 10] <= 6] == 0).all(), "the source itself has none"
    assert middle[28, 18] == pytest.approx(50 * 2 * np.exp(-8 / 30), rel=1e-4), "all crests meet along the first axis"
    assert middle.min() < -10
    assert np.abs(hu[:, :, 0]).max() < 0.9 * np.abs(middle).max()


def test_motion_smears_a_vessel_along_its_heading_and_what_is_far_stays():
    hu, vessel = image(0.0), np.zeros(SHAPE, np.float32)
    hu[10, 10], hu[30, 30] = 400.0, 400.0
    vessel[10, 10] = 1
    before = hu.copy()
    blur_by_motion(hu, vessel, motion_mm=4.0, heading=0.0, spacing_mm=SPACING_MM)
    assert hu[10, 10, 10] < 0.7 * 400
    assert hu[12, 10, 10] > 40
    assert abs(hu[10, 12, 10]) < 10, "across it there is no motion"
    np.testing.assert_array_equal(hu[28:33, 28:33], before[28:33, 28:33])


def test_without_motion_nothing_changes():
    hu = np.random.default_rng(0).normal(0, 50, SHAPE).astype(np.float32)
    vessel, before = np.zeros(SHAPE, np.float32), hu.copy()
    vessel[20, 18] = 1
    blur_by_motion(hu, vessel, motion_mm=0.0, heading=1.0, spacing_mm=SPACING_MM)
    np.testing.assert_allclose(hu, before, atol=1e-3)
