"""Surfaces and their distances: closed forms, and what MONAI finds."""

import numpy as np
import pytest
import torch
from custom.geometry.surfaces import surface, surface_distances
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage

SPACING_MM = (0.5, 2.0, 1.25)


def test_the_surface_is_what_erosion_takes_away():
    for seed, shape in enumerate([(7, 9, 8), (1, 5, 5), (2, 2, 2), (6, 1, 1)]):
        mask = np.random.default_rng(seed).random(shape) < 0.8
        np.testing.assert_array_equal(surface(mask), mask & ~ndimage.binary_erosion(mask))
    assert not surface(np.zeros((3, 3, 3))).any()


def test_boxes_apart_are_as_far_as_they_were_moved():
    mask = np.zeros((20, 6, 6), bool)
    mask[2:5, 2:5, 2:5] = True
    here, there = surface_distances(mask, np.roll(mask, 6, 0), (2.0, 1.0, 1.0))
    assert len(here) == len(there) == 26
    assert sorted(set(here)) == sorted(set(there)) == [8.0, 10.0, 12.0]


@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_of_monai(seed):
    rng = np.random.default_rng(seed)
    mask, other = (ndimage.gaussian_filter(rng.normal(size=(23, 18, 20)), 2) > 0.02 for _ in range(2))
    _, expected, _ = get_edge_surface_distance(
        torch.from_numpy(mask), torch.from_numpy(other), spacing=list(SPACING_MM), symmetric=True
    )
    for found, wanted in zip(surface_distances(mask, other, SPACING_MM), expected, strict=True):
        np.testing.assert_allclose(np.sort(found), np.sort(wanted.numpy()), atol=1e-6)
        assert found.dtype == np.float32


def test_a_mask_has_no_distance_to_itself_nor_to_nothing():
    mask = np.random.default_rng(0).random((6, 7, 8)) < 0.5
    assert not any(distances.any() for distances in surface_distances(mask, mask))
    with pytest.raises(ValueError, match="mask and other must both hold a voxel"):
        surface_distances(mask, np.zeros_like(mask))
    with pytest.raises(ValueError, match=r"one shape, got \(6, 7, 8\) and \(6, 7, 7\)"):
        surface_distances(mask, mask[..., 1:])
