"""Topology against masks whose Betti numbers are known by construction."""

import numpy as np
import pytest

from custom.topology import (
    betti_numbers,
    cl_dice,
    components_touching,
    fill_cavities,
    label_adjacency,
    largest_components,
    skeleton,
)

GRID = np.moveaxis(np.indices((31, 33, 29)), 0, -1) - np.array([15, 16, 14])


def ball(radius, centre=(0, 0, 0)):
    return ((GRID - np.array(centre)) ** 2).sum(-1) <= radius**2


def shell():
    return ball(10) & ~ball(6)


def torus(ring=9, radius=3):
    h, w, d = np.moveaxis(GRID, -1, 0)
    return (np.hypot(h, w) - ring) ** 2 + d**2 <= radius**2


def tube(start, end, radius):
    start, end = np.array(start, float), np.array(end, float)
    along = np.clip((GRID - start) @ (end - start) / ((end - start) ** 2).sum(), 0, 1)
    return ((GRID - start - along[..., None] * (end - start)) ** 2).sum(-1) <= radius**2


def hollow_tube():
    return tube((0, 0, -10), (0, 0, 10), 6) & ~tube((0, 0, -30), (0, 0, 30), 3)


def voxels(*positions, shape=(5, 5, 5)):
    mask = np.zeros(shape, bool)
    for position in positions:
        mask[position] = True
    return mask


KNOWN = {
    "empty": (np.zeros((5, 6, 7), bool), (0, 0, 0)),
    "one voxel": (voxels((2, 2, 2)), (1, 0, 0)),
    "one voxel in a corner": (voxels((0, 0, 0)), (1, 0, 0)),
    "full array": (np.ones((4, 5, 6), bool), (1, 0, 0)),
    "ball": (ball(9), (1, 0, 0)),
    "shell": (shell(), (1, 0, 1)),
    "torus": (torus(), (1, 1, 0)),
    "tube": (tube((-9, -9, -9), (9, 9, 9), 2), (1, 0, 0)),
    "tube cut by the border": (tube((-40, 3, 2), (40, 3, 2), 3), (1, 0, 0)),
    "open hollow tube": (hollow_tube(), (1, 1, 0)),
    "hollow tube cut by both borders": (
        tube((0, 0, -30), (0, 0, 30), 6) & ~tube((0, 0, -30), (0, 0, 30), 3),
        (1, 1, 0),
    ),
    "two balls": (ball(4, (-8, 0, 0)) | ball(4, (8, 0, 0)), (2, 0, 0)),
    "neighbours over a corner": (voxels((1, 1, 1), (2, 2, 2)), (1, 0, 0)),
    "neighbours over an edge": (voxels((1, 1, 1), (2, 2, 1)), (1, 0, 0)),
    "one voxel apart": (voxels((1, 1, 1), (3, 1, 1)), (2, 0, 0)),
    "shell with a ball inside": (shell() | ball(2), (2, 0, 1)),
    "torus and shell": (np.concatenate([torus(), shell()]), (2, 1, 1)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_betti_numbers_of_known_shapes(name):
    mask, expected = KNOWN[name]
    assert betti_numbers(mask) == expected
    assert betti_numbers(mask.astype(np.uint8) * 7) == expected


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


def test_label_adjacency_counts_faces_only():
    labels = np.zeros((4, 4, 4), int)
    labels[0, 0, 0], labels[0, 0, 1], labels[1, 0, 1] = 3, 1, 7
    labels[1, 1, 2] = 9  # meets 7 over an edge, 1 over a corner
    assert label_adjacency(labels) == {(1, 3), (1, 7)}


def test_label_adjacency_ignores_background_and_itself():
    assert label_adjacency(np.zeros((3, 3, 3), int)) == set()
    assert label_adjacency(np.full((3, 3, 3), 4)) == set()
    separated = np.zeros((5, 3, 3), int)
    separated[0], separated[4] = 1, 2
    assert label_adjacency(separated) == set()


def test_label_adjacency_does_not_wrap_unsigned_labels():
    labels = np.zeros((2, 1, 1), np.uint8)
    labels[:, 0, 0] = 255, 1
    assert label_adjacency(labels) == {(1, 255)}


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


@pytest.mark.parametrize("function", [betti_numbers, skeleton, fill_cavities, label_adjacency])
def test_arrays_with_batch_axes_are_rejected(function):
    with pytest.raises(ValueError, match=r"must be a 3D array \(H, W, D\), got shape \(1, 3, 3, 3\)"):
        function(np.zeros((1, 3, 3, 3)))


@pytest.mark.parametrize("function", [cl_dice, components_touching])
def test_different_shapes_are_rejected(function):
    with pytest.raises(ValueError, match=r"one shape, got \(3, 3, 3\) and \(3, 3, 4\)"):
        function(np.ones((3, 3, 3)), np.ones((3, 3, 4)))
