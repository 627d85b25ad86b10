"""Vessel trees: read, carried and drawn without breaking."""

import numpy as np
import pytest
from shapes import GRID, ball, torus, tube

from custom.topology import betti_numbers
from custom.vessels import VesselTree, carry, draw, fit_radii, read_tree

SPACING = (1.0, 1.0, 1.0)
CENTRE = np.array([15, 16, 14])


def fork():
    return tube((0, 0, -11), (0, 0, 0), 2) | tube((0, 0, 0), (9, 0, 9), 2) | tube((0, 0, 0), (-9, 3, 9), 2)


def test_the_centre_line_of_a_tube_is_its_axis():
    tree = read_tree(tube((0, 0, -9), (0, 0, 9), 3), SPACING)
    inner = np.abs(tree.points_mm[:, 2] - CENTRE[2]) < 7
    np.testing.assert_allclose(tree.points_mm[inner, :2], np.tile(CENTRE[:2], (inner.sum(), 1)), atol=0.51)
    np.testing.assert_allclose(tree.radii_mm[inner], 3.0, atol=0.7)


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
    tree = fit_radii(read_tree(mask, SPACING), mask.sum(), mask.shape, SPACING)
    drawn = draw(tree, mask.shape, SPACING)
    assert betti_numbers(drawn) == (1, 0, 0)
    assert drawn.sum() == pytest.approx(mask.sum(), rel=0.1)  # along an axis many voxels come and go at once
    assert 2 * (drawn & mask).sum() / (drawn.sum() + mask.sum()) > 0.85


@pytest.mark.parametrize("radius_mm", [0.0, 0.3, 1.2])
def test_thin_vessels_do_not_break_on_anisotropic_grids(radius_mm):
    turns = np.linspace(0, 4 * np.pi, 80)
    points = np.stack([20 + 12 * np.cos(turns), 20 + 12 * np.sin(turns), 3 + turns * 3], 1)
    edges = np.stack([np.arange(79), np.arange(1, 80)], 1)
    drawn = draw(VesselTree(points, np.full(80, radius_mm), edges), (50, 40, 20), (0.8, 1.0, 2.5))
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


def test_empty_masks_single_voxels_and_what_lies_outside_the_grid():
    empty = read_tree(np.zeros((4, 5, 6)), SPACING)
    assert len(empty.points_mm) == 0
    assert not draw(empty, (4, 5, 6), SPACING).any()
    single = np.zeros((4, 5, 6), bool)
    single[1, 2, 3] = True
    np.testing.assert_array_equal(draw(read_tree(single, SPACING), single.shape, SPACING)[1, 2, 3], True)
    away = carry(read_tree(single, SPACING), lambda points: points + 100.0)
    assert not draw(away, single.shape, SPACING).any()
