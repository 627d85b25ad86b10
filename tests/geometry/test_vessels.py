"""Vessel trees: read, carried and drawn without breaking."""

import numpy as np
import pytest
from custom.geometry.centrelines import grow
from custom.geometry.topology import betti_numbers
from custom.geometry.vessels import VesselTree, anchored, carry, draw, prune, read_tree, tree_length_mm, tree_volume_mm3
from shapes import GRID, ball, torus, tube

SPACING = (1.0, 1.0, 1.0)
CENTRE = np.array([15, 16, 14])


def fork():
    return tube((0, 0, -11), (0, 0, 0), 2) | tube((0, 0, 0), (9, 0, 9), 2) | tube((0, 0, 0), (-9, 3, 9), 2)


def test_the_centre_line_of_a_tube_is_its_axis():
    tree = read_tree(tube((0, 0, -9), (0, 0, 9), 3), SPACING)
    inner = np.abs(tree.points_mm[:, 2] - CENTRE[2]) < 7
    np.testing.assert_allclose(tree.points_mm[inner, :2], np.tile(CENTRE[:2], (inner.sum(), 1)), atol=0.1)
    np.testing.assert_allclose(tree.radii_mm[inner], 3.0, atol=0.2)


def test_the_centre_line_of_an_even_width_lies_between_voxels():
    bar = np.zeros((12, 12, 30), bool)
    bar[4:6, 5:7, 3:27] = True
    tree = read_tree(bar, SPACING)
    inner = np.abs(tree.points_mm[:, 2] - 14.5) < 9
    np.testing.assert_allclose(tree.points_mm[inner, :2], np.tile([4.5, 5.5], (inner.sum(), 1)), atol=0.05)
    np.testing.assert_allclose(tree.radii_mm[inner], np.sqrt(4 / np.pi), atol=0.05)  # the tube of its cross-section


@pytest.mark.parametrize(("mask", "trees"), [(fork(), 1), (torus(), 1), (ball(3, (-8, 0, 0)) | ball(3, (8, 0, 0)), 2)])
def test_reading_gives_one_tree_a_component_without_loops(mask, trees):
    tree = read_tree(mask, SPACING)
    assert len(tree.points_mm) - len(tree.edges) == trees


def test_lengths_are_in_mm():
    mask = tube((0, 0, -9), (0, 0, 9), 3)
    fine = read_tree(mask, SPACING)
    scaled = read_tree(mask, (2.0, 2.0, 2.0))
    np.testing.assert_allclose(scaled.points_mm, 2 * fine.points_mm)
    np.testing.assert_allclose(scaled.radii_mm, 2 * fine.radii_mm)


def test_a_drawn_fork_is_the_fork():
    mask = fork()
    tree = read_tree(mask, SPACING)
    drawn = draw(tree, mask.shape, SPACING)
    assert betti_numbers(drawn) == (1, 0, 0)
    assert drawn.sum() == pytest.approx(mask.sum(), rel=0.1)
    assert tree_volume_mm3(tree) == pytest.approx(mask.sum(), rel=0.1)
    assert tree_length_mm(tree) == pytest.approx(11 + np.hypot(9, 9) + np.sqrt(9**2 + 3**2 + 9**2), rel=0.1)
    assert 2 * (drawn & mask).sum() / (drawn.sum() + mask.sum()) > 0.88


def test_an_anchored_tree_touches_its_target_wherever_it_is_drawn():
    vessel, target = tube((0, 0, -8), (0, 0, 4), 1), ball(4, (0, 0, 10))
    tree = anchored(read_tree(vessel, SPACING), target, SPACING)
    root = tree.points_mm[tree.roots]
    assert len(root) == 1
    assert target[tuple(np.rint(root[0]).astype(int))]
    shift = carry(tree, lambda points: points + np.array([0.4, 0.3, 0.0]))
    assert (draw(shift, target.shape, SPACING) & target).any()
    with pytest.raises(ValueError, match=r"target must not be empty"):
        anchored(tree, np.zeros_like(target), SPACING)


def test_roots_of_two_trees_are_never_neighbours():
    vessels = tube((-2, 0, -8), (-2, 0, 2), 0.5) | tube((2, 0, -8), (2, 0, 2), 0.5)
    tree = anchored(read_tree(vessels, SPACING), ball(3, (0, 0, 7)), SPACING)
    roots = np.rint(tree.points_mm[tree.roots]).astype(int)
    assert np.abs(roots[0] - roots[1]).max() > 1
    single = np.zeros_like(vessels)
    single[15, 16, 21] = True
    with pytest.raises(ValueError, match=r"no voxel left for tree 1"):
        anchored(read_tree(vessels, SPACING), single, SPACING)


def test_a_second_target_adds_links_and_keeps_the_roots():
    first = rooted_fork()
    second = anchored(first, ball(2, (9, 0, 12)), SPACING)
    np.testing.assert_array_equal(second.roots, first.roots)
    assert len(second.points_mm) == len(first.points_mm) + 1


def rooted_fork():
    return anchored(read_tree(fork(), SPACING), ball(2, (0, 0, -13)), SPACING)


def test_pruning_takes_end_branches_and_never_the_root():
    tree = rooted_fork()
    pruned, count = prune(tree, probability=1.0, max_length_mm=100, rng=np.random.default_rng(0))
    assert count == 1  # a fork keeps one of its two branches
    assert len(pruned.points_mm) - len(pruned.edges) == 1
    np.testing.assert_array_equal(pruned.points_mm[pruned.roots], tree.points_mm[tree.roots])
    drawn = draw(pruned, GRID.shape[:3], SPACING)
    assert betti_numbers(drawn) == (1, 0, 0)
    assert drawn.sum() < 0.85 * draw(tree, GRID.shape[:3], SPACING).sum()


@pytest.mark.parametrize(
    "options", [{"probability": 0.0, "max_length_mm": 100}, {"probability": 1.0, "max_length_mm": 1}]
)
def test_nothing_is_pruned_without_probability_or_with_long_branches_only(options):
    tree = rooted_fork()
    same, count = prune(tree, rng=np.random.default_rng(0), **options)
    assert count == 0
    np.testing.assert_array_equal(same.points_mm, tree.points_mm)
    np.testing.assert_array_equal(same.edges, tree.edges)


def test_a_branch_that_crosses_another_is_grown_without_a_loop():
    turn = np.linspace(0, 2 * np.pi, 60)
    points = np.stack([15 + 8 * np.cos(turn), 15 + 8 * np.sin(turn), np.full(60, 14.0)], 1)  # it ends where it began
    edges = np.stack([np.arange(59), np.arange(1, 60)], 1)
    ring = draw(VesselTree(points, np.full(60, 1.5), edges, np.array([0])), (31, 31, 29), SPACING)
    assert betti_numbers(ring) == (1, 1, 0)
    seed = np.zeros_like(ring)
    seed[23, 15, 14] = True
    assert betti_numbers(grow(seed, ring)) == (1, 0, 0)


@pytest.mark.parametrize("radius_mm", [0.0, 0.3, 1.2])
def test_thin_vessels_do_not_break_on_anisotropic_grids(radius_mm):
    turns = np.linspace(0, 4 * np.pi, 80)
    points = np.stack([20 + 12 * np.cos(turns), 20 + 12 * np.sin(turns), 3 + turns * 3], 1)
    edges = np.stack([np.arange(79), np.arange(1, 80)], 1)
    drawn = draw(VesselTree(points, np.full(80, radius_mm), edges, np.array([0])), (50, 40, 20), (0.8, 1.0, 2.5))
    assert betti_numbers(drawn)[0] == 1
    assert drawn.any()


def test_carrying_moves_points_and_keeps_links_and_radii():
    tree = read_tree(fork(), SPACING)
    moved = carry(tree, lambda points: points + np.array([1.0, 0.0, -2.0]))
    np.testing.assert_allclose(moved.points_mm - tree.points_mm, np.tile([1.0, 0.0, -2.0], (len(tree.points_mm), 1)))
    assert moved.edges is tree.edges
    assert moved.radii_mm is tree.radii_mm


def test_a_shift_by_whole_voxels_draws_the_shifted_vessel():
    tree = read_tree(fork(), SPACING)
    moved = carry(tree, lambda points: points + np.array([2.0, 0.0, 0.0]))
    np.testing.assert_array_equal(draw(moved, GRID.shape[:3], SPACING)[2:], draw(tree, GRID.shape[:3], SPACING)[:-2])


def test_impossible_pruning_is_refused():
    with pytest.raises(ValueError, match=r"probability must be 0 to 1 and max_length_mm not negative, got 1.5 and 3"):
        prune(rooted_fork(), probability=1.5, max_length_mm=3, rng=np.random.default_rng(0))


def test_empty_masks_single_voxels_and_what_lies_outside_the_grid():
    empty = read_tree(np.zeros((4, 5, 6)), SPACING)
    assert len(empty.points_mm) == 0
    assert not draw(empty, (4, 5, 6), SPACING).any()
    single = np.zeros((4, 5, 6), bool)
    single[1, 2, 3] = True
    np.testing.assert_array_equal(draw(read_tree(single, SPACING), single.shape, SPACING)[1, 2, 3], True)
    away = carry(read_tree(single, SPACING), lambda points: points + 100.0)
    assert not draw(away, single.shape, SPACING).any()
