"""Distances to cones against closed forms."""

import numpy as np
import pytest
from custom.geometry.cones import lower_to_cones

SHAPE, SPACING = (24, 20, 16), (1.0, 1.5, 0.5)
POSITIONS = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(SHAPE, SPACING, strict=True)), indexing="ij"), -1)


def lowered(points, radii, links, *, start=np.inf, dtype=np.float64, reach_mm=100.0, **options):
    distance = np.full(SHAPE, start, dtype)
    points, radii = np.array(points, float), np.array(radii, float)
    lower_to_cones(distance, points, radii, links, **{"spacing_mm": SPACING, "reach_mm": reach_mm, **options})
    return distance


def test_a_point_linked_to_itself_is_a_ball():
    centre = (11.3, 12.0, 4.1)
    distance = lowered([centre], [3.0], [(0, 0)])
    np.testing.assert_allclose(distance, np.linalg.norm(POSITIONS - centre, axis=-1) - 3, atol=1e-12)


def test_a_cone_narrows_along_its_axis_and_ends_in_balls():
    distance = lowered([(4, 15, 4), (20, 15, 4)], [4.0, 2.0], [(0, 1)])
    x, aside = POSITIONS[..., 0], np.linalg.norm(POSITIONS[..., 1:] - [15, 4], axis=-1)
    expected = np.where(
        x < 4,
        np.hypot(x - 4, aside) - 4,
        np.where(x > 20, np.hypot(x - 20, aside) - 2, aside - 4 + 2 * (np.clip(x, 4, 20) - 4) / 16),
    )
    np.testing.assert_allclose(distance, expected, atol=1e-12)


def test_the_nearest_of_a_chain_counts_and_nothing_is_raised():
    points, radii = [(3, 3, 3), (12, 20, 4), (21, 6, 5)], [1.0, 2.0, 1.5]
    parts = [lowered(points, radii, [link]) for link in ((0, 1), (1, 2))]
    np.testing.assert_array_equal(lowered(points, radii, [(1, 2), (0, 1)]), np.minimum(*parts))
    np.testing.assert_array_equal(lowered(points, radii, [(0, 1)], start=-5.0), np.minimum(parts[0], -5.0))


def test_what_is_out_of_reach_is_left_alone():
    whole = lowered([(5, 5, 3), (9, 8, 3)], [1.0, 1.0], [(0, 1)])
    near = lowered([(5, 5, 3), (9, 8, 3)], [1.0, 1.0], [(0, 1)], start=50.0, reach_mm=2.0)
    np.testing.assert_array_equal(near[whole <= 2], whole[whole <= 2])
    assert (near[16:] == 50).all()
    assert not np.isinf(lowered([(5, 5, 3)], [1.0], [(0, 0)])).any()
    assert (lowered([(500, 5, 3)], [1.0], [(0, 0)], start=50.0, reach_mm=2.0) == 50).all()
    assert (lowered(np.zeros((0, 3)), [], [], start=50.0) == 50).all()


def test_the_origin_shifts_positions_and_may_lie_between_voxels():
    origin = np.array([11.5, 9.5, 7.5])
    points = np.array([(4.0, 12.0, 4.0), (18.0, 15.0, 2.0)])
    moved = lowered(points - origin * SPACING, [2.0, 1.0], [(0, 1)], origin_voxels=origin)
    np.testing.assert_allclose(moved, lowered(points, [2.0, 1.0], [(0, 1)]), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_precision_is_that_of_the_distances(dtype, tolerance):
    distance = lowered([(4.3, 12.1, 4.7)], [2.0], [(0, 0)], dtype=dtype)
    assert distance.dtype == dtype
    error = np.abs(distance - np.linalg.norm(POSITIONS - [4.3, 12.1, 4.7], axis=-1) + 2).max()
    assert error < tolerance
    assert dtype == np.float64 or error > 0
