"""Topology against masks whose Betti numbers are known by construction."""

import numpy as np
import pytest
from custom.geometry.topology import (
    betti_errors,
    betti_numbers,
    components_touching,
    contact_areas,
    euler_characteristic,
    fill_cavities,
    largest_components,
)
from scipy import ndimage
from shapes import GRID, KNOWN, ball, hollow_tube, shell, torus, voxels
from skimage.measure import euler_number


@pytest.mark.parametrize("name", KNOWN)
def test_betti_numbers_of_known_shapes(name):
    mask, expected = KNOWN[name]
    assert betti_numbers(mask) == expected
    assert betti_numbers(mask.astype(np.uint8) * 7) == expected


def scattered(seed):
    """A mask of small size, few or most of its voxels set."""
    rng = np.random.default_rng(seed)
    return rng.random(rng.integers(1, 12, 3)) < rng.choice([0.02, 0.1, 0.3, 0.6, 0.9, 0.97])


def test_numbers_of_scattered_voxels_are_those_of_the_whole_mask_and_its_background():
    """Cavities are looked for in the box of each component; scikit-image counts the Euler characteristic otherwise."""
    for mask in map(scattered, range(150)):
        padded = np.pad(mask, 1)
        components, background = ndimage.label(padded, np.ones((3, 3, 3)))[1], ndimage.label(~padded)[1]
        chi = euler_number(padded, connectivity=3)
        assert euler_characteristic(mask) == chi
        expected = (components, components + background - 1 - chi, background - 1) if mask.any() else (0, 0, 0)
        assert betti_numbers(mask) == betti_numbers(np.asfortranarray(mask)) == expected


def test_a_ball_in_the_cavity_of_a_shell_leaves_one_cavity():
    mask = shell() | ball(2)
    assert betti_numbers(mask) == (2, 0, 1)


@pytest.mark.parametrize(("a", "b", "errors"), [("ball", "torus", (0, 1, 0)), ("two balls", "shell", (1, 0, 1))])
def test_betti_errors_are_differences_without_sign(a, b, errors):
    assert betti_errors(KNOWN[a][0], KNOWN[b][0]) == betti_errors(KNOWN[b][0], KNOWN[a][0]) == errors
    assert betti_errors(KNOWN[a][0], KNOWN[a][0]) == (0, 0, 0)


def test_fill_cavities_fills_only_what_is_closed():
    assert betti_numbers(fill_cavities(shell())) == (1, 0, 0)
    np.testing.assert_array_equal(fill_cavities(shell()), ball(10))
    np.testing.assert_array_equal(fill_cavities(torus()), torus())
    np.testing.assert_array_equal(fill_cavities(hollow_tube()), hollow_tube())
    assert not fill_cavities(np.zeros((3, 3, 3))).any()


def test_fill_cavities_leaves_its_argument_alone():
    mask = shell()
    fill_cavities(mask)
    assert betti_numbers(mask) == (1, 0, 1)


def test_largest_components_keeps_the_largest():
    big, middle, small = ball(6, (-8, 0, 0)), ball(4, (8, 0, 0)), voxels((0, 0, 0), shape=GRID.shape[:3])
    mask = big | middle | small
    np.testing.assert_array_equal(largest_components(mask, 1), big)
    np.testing.assert_array_equal(largest_components(mask, 2), big | middle)
    np.testing.assert_array_equal(largest_components(mask, 9), mask)
    assert not largest_components(np.zeros((3, 3, 3)), 1).any()


def test_largest_components_of_equal_size_keeps_the_first():
    np.testing.assert_array_equal(largest_components(voxels((0, 0, 0), (4, 4, 4)), 1), voxels((0, 0, 0)))


def test_largest_components_rejects_a_count_of_zero():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        largest_components(np.ones((2, 2, 2)), 0)


def test_components_touching_counts_contacts_over_corners_and_overlaps():
    other = voxels((2, 2, 2))
    assert components_touching(voxels((1, 1, 1)), other) == (1, 1)
    assert components_touching(voxels((2, 2, 2)), other) == (1, 1)
    assert components_touching(voxels((0, 0, 0)), other) == (0, 1)
    assert components_touching(voxels((1, 1, 1), (4, 4, 4)), other) == (1, 2)
    assert components_touching(voxels((1, 2, 2), (3, 2, 2)), other) == (2, 2)


def test_components_touching_with_empty_masks():
    empty, one = np.zeros((5, 5, 5)), voxels((2, 2, 2))
    assert components_touching(empty, one) == (0, 0)
    assert components_touching(one, empty) == (0, 1)
    assert components_touching(empty, empty) == (0, 0)


def test_contacts_count_faces_only():
    labels = np.zeros((4, 4, 4), int)
    labels[0, 0, 0], labels[0, 0, 1], labels[1, 0, 1] = 3, 1, 7
    labels[1, 1, 2] = 9  # meets 7 over an edge, 1 over a corner
    assert contact_areas(labels) == {(1, 3): 1.0, (1, 7): 1.0}


def test_contact_areas_are_in_mm2_of_the_faces():
    labels = np.ones((2, 3, 4), int)
    labels[1] = 2
    assert contact_areas(labels, (9.0, 0.5, 2.0)) == {(1, 2): pytest.approx(12 * 0.5 * 2.0)}
    assert contact_areas(labels.swapaxes(0, 2), (2.0, 0.5, 9.0)) == {(1, 2): pytest.approx(12.0)}


def test_contacts_ignore_background_and_itself():
    assert contact_areas(np.zeros((3, 3, 3), int)) == {}
    assert contact_areas(np.full((3, 3, 3), 4)) == {}
    separated = np.zeros((5, 3, 3), int)
    separated[0], separated[4] = 1, 2
    assert contact_areas(separated) == {}


def test_contacts_do_not_wrap_unsigned_labels():
    labels = np.zeros((2, 1, 1), np.uint8)
    labels[:, 0, 0] = 255, 1
    assert contact_areas(labels) == {(1, 255): 1.0}


@pytest.mark.parametrize("function", [betti_numbers, fill_cavities, contact_areas])
def test_arrays_with_batch_axes_are_rejected(function):
    with pytest.raises(ValueError, match=r"must be a 3D array \(H, W, D\), got shape \(1, 3, 3, 3\)"):
        function(np.zeros((1, 3, 3, 3)))


def test_different_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"one shape, got \(3, 3, 3\) and \(3, 3, 4\)"):
        components_touching(np.ones((3, 3, 3)), np.ones((3, 3, 4)))
