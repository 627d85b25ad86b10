"""Centre lines and growth: voxels come and go, the topology stays."""

import numpy as np
import pytest
from custom.geometry.centrelines import cl_dice, grow, skeleton
from custom.geometry.topology import betti_numbers
from shapes import KNOWN, ball, torus, tube, voxels


@pytest.mark.parametrize("name", KNOWN)
def test_skeleton_is_a_subset_with_the_same_betti_numbers(name):
    mask, expected = KNOWN[name]
    thin = skeleton(mask)
    assert thin.dtype == bool
    assert thin.shape == mask.shape
    assert not (thin & ~mask).any()
    assert betti_numbers(thin) == expected


def test_skeleton_keeps_the_topology_of_noise():
    rng = np.random.default_rng(0)
    for density in np.linspace(0.05, 0.95, 20):
        mask = rng.random((11, 12, 10)) < density
        assert betti_numbers(skeleton(mask)) == betti_numbers(mask)


def test_the_order_of_axes_in_memory_changes_neither_centre_lines_nor_growth():
    """A tight mask in Fortran order was returned unthinned."""
    mask = tube((-8, -3, 0), (8, 3, 5), 2)
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(mask))
    tight, seed = np.ascontiguousarray(mask[box]), np.zeros_like(mask[box])
    seed[tuple(np.argwhere(skeleton(tight))[0])] = True
    turned = np.asfortranarray(tight)
    np.testing.assert_array_equal(skeleton(turned), skeleton(tight))
    np.testing.assert_array_equal(grow(np.asfortranarray(seed), turned), grow(seed, tight))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_skeleton_of_a_bar_keeps_its_length(width):
    # scikit-image's skeletonize leaves nothing of the bar two voxels wide.
    mask = np.zeros((9, 9, 30), bool)
    mask[2 : 2 + width, 3 : 3 + width, 4:24] = True
    kept = skeleton(mask)
    assert 20 - width <= kept.sum() <= 20
    assert np.ptp(np.nonzero(kept)[2]) >= 19 - width


@pytest.mark.parametrize("radius", [1.0, 1.6, 2.0, 3.0])
def test_skeleton_of_an_oblique_tube_is_its_axis(radius):
    kept = np.argwhere(skeleton(tube((-10, -11, -9), (10, 11, 9), radius))) - np.array([15, 16, 14])
    direction = np.array([20, 22, 18]) / np.linalg.norm([20, 22, 18])
    along = kept @ direction
    distance = np.linalg.norm(kept - np.outer(along, direction), axis=1)
    assert distance[np.abs(along) < 12].max() <= 1.0  # the ends may bend into the round caps
    assert 20 <= len(kept) <= 30  # the longest axis of the tube spans 22 voxels


def test_cl_dice_of_empty_masks():
    empty, one = np.zeros((5, 5, 5)), voxels((2, 2, 2))
    assert cl_dice(empty, empty) == 1.0
    assert cl_dice(one, empty) == 0.0
    assert cl_dice(empty, one) == 0.0


def test_cl_dice_does_not_care_about_the_radius_but_about_the_course():
    thin, thick = (tube((-9, 0, 0), (9, 0, 0), radius) for radius in (1, 3))
    elsewhere = tube((-9, 9, 0), (9, 9, 0), 1)
    assert cl_dice(thin, thin) == 1.0
    assert cl_dice(thin, thick) > 0.95  # the thick one's axis may end beyond the thin one
    assert cl_dice(thin, elsewhere) == 0.0


def test_cl_dice_of_half_a_vessel_by_hand():
    whole = np.zeros((3, 3, 20), bool)
    whole[1, 1] = True
    half = whole.copy()
    half[:, :, 10:] = False
    assert cl_dice(half, whole) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert cl_dice(whole, half) == pytest.approx(2 * 1.0 * 0.5 / 1.5)


@pytest.mark.parametrize("name", KNOWN)
def test_growth_keeps_the_topology_of_its_seed_within_any_mask(name):
    within, _ = KNOWN[name]
    seed = np.zeros_like(within)
    if within.any():
        seed.flat[np.flatnonzero(within)[0]] = True
    grown = grow(seed, within)
    assert not (grown & ~within).any()
    assert betti_numbers(grown) == ((1, 0, 0) if within.any() else (0, 0, 0))


def test_growth_cuts_a_torus_once_and_fills_the_rest():
    cut = torus() & ~grow(ball(1, (9, 0, 0)), torus())
    assert betti_numbers(cut) == (1, 0, 0)
    assert cut.sum() < 0.05 * torus().sum()


def test_growth_fills_a_ball_and_keeps_a_handle_of_its_seed():
    np.testing.assert_array_equal(grow(ball(2), ball(9)), ball(9))
    assert betti_numbers(grow(torus(9, 1), ball(13))) == (1, 1, 0)


def test_growth_does_not_join_two_seeds():
    seeds = ball(2, (-5, 0, 0)) | ball(2, (5, 0, 0))
    grown = grow(seeds, ball(11))
    assert betti_numbers(grown) == (2, 0, 0)
    assert grown.sum() > 0.85 * ball(11).sum()


def test_growth_in_noise_keeps_one_component_without_handles():
    within = np.random.default_rng(5).random((24, 23, 22)) < 0.6
    seed = np.zeros_like(within)
    seed.flat[np.flatnonzero(within)[1000]] = True
    assert betti_numbers(within)[1] > 100
    assert betti_numbers(grow(seed, within)) == (1, 0, 0)


@pytest.mark.parametrize("function", [cl_dice, grow])
def test_different_shapes_are_rejected(function):
    with pytest.raises(ValueError, match=r"one shape, got \(3, 3, 3\) and \(3, 3, 4\)"):
        function(np.ones((3, 3, 3)), np.ones((3, 3, 4)))


def test_a_batch_axis_is_rejected():
    with pytest.raises(ValueError, match=r"must be a 3D array \(H, W, D\), got shape \(1, 3, 3, 3\)"):
        skeleton(np.zeros((1, 3, 3, 3)))
