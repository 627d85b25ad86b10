"""Preparation brings noisy label maps to the intended topology, and says what it did."""

import numpy as np
import pytest
from custom.geometry.topology import betti_numbers
from custom.masks.preparation import prepare_label_map, smooth_label_map
from custom.volumes.anatomy import Label
from shapes import ball, torus, tube

SPACING = (1.0, 1.0, 1.0)
CHAMBER, VESSEL = Label("chamber"), Label("vessel", handles=0, thin=True, touches=(1,))


def noisy_ball():
    """A ball with pinholes, and specks around it."""
    noise = np.random.default_rng(0).random(ball(10).shape)
    return ((ball(10) & (noise < 0.95)) | (~ball(11) & (noise > 0.98))).astype(np.uint8)


def test_a_noisy_chamber_becomes_one_piece_without_cavities_and_stays_itself():
    assert betti_numbers(noisy_ball())[0] > 50
    prepared, report = prepare_label_map(noisy_ball(), {1: CHAMBER}, spacing_mm=SPACING)
    assert betti_numbers(prepared == 1) == (1, 0, 0)
    assert 2 * ((prepared == 1) & ball(10)).sum() / ((prepared == 1).sum() + ball(10).sum()) > 0.97
    assert report[1]["betti_before"] == betti_numbers(noisy_ball())
    assert report[1]["betti_after"] == (1, 0, 0)
    assert report[1]["voxels_after"] == (prepared == 1).sum()


def test_a_second_preparation_hardly_changes_anything():
    once, _ = prepare_label_map(noisy_ball(), {1: CHAMBER}, spacing_mm=SPACING)
    _, report = prepare_label_map(once, {1: CHAMBER}, spacing_mm=SPACING)
    assert report[1]["dice"] > 0.98


@pytest.mark.parametrize(("allowed", "handles"), [(0, 0), (1, 1)])
def test_handles_are_cut_only_beyond_the_allowed_number(allowed, handles):
    label = torus().astype(np.uint8)
    prepared, _ = prepare_label_map(label, {1: Label("ring", handles=allowed)}, spacing_mm=SPACING)
    assert betti_numbers(prepared == 1) == (1, handles, 0)


def test_vessels_keep_every_voxel_and_win_over_walls():
    label = ball(8).astype(np.uint8)
    vessel = tube((0, 0, 7), (0, 0, 13), 1)
    label[vessel] = 2
    prepared, report = prepare_label_map(label, {1: CHAMBER, 2: VESSEL}, spacing_mm=SPACING)
    np.testing.assert_array_equal(prepared == 2, vessel)
    assert report[2]["dice"] == 1.0


def test_smoothing_is_in_mm_along_each_axis():
    label = noisy_ball()
    thick = np.repeat(label, 2, axis=2)
    smooth = smooth_label_map(label, [1], spacing_mm=SPACING, sigma_mm=1.0)
    twice = smooth_label_map(thick, [1], spacing_mm=(1.0, 1.0, 0.5), sigma_mm=1.0)
    assert (np.repeat(smooth, 2, axis=2) != twice).mean() < 0.01


def test_ids_without_a_structure_become_background_and_absent_ones_are_not_reported():
    label = ball(6).astype(np.uint8)
    label[ball(3, (11, 0, 0))] = 7
    prepared, report = prepare_label_map(label, {1: CHAMBER, 4: Label("absent")}, spacing_mm=SPACING)
    assert set(np.unique(prepared)) == {0, 1}
    assert list(report) == [1]


def test_a_label_cut_by_the_border_stays_there():
    label = (tube((-40, 0, 0), (40, 0, 0), 5)).astype(np.uint8)
    prepared, _ = prepare_label_map(label, {1: CHAMBER}, spacing_mm=SPACING)
    assert (prepared[0] == 1).sum() == (prepared[15] == 1).sum() > 0.9 * (label[0] == 1).sum()


@pytest.mark.parametrize(
    ("label", "structures", "message"),
    [
        (np.zeros((9, 9, 9)), {1: CHAMBER}, r"none of the labels \[1\]"),
        (np.ones((1, 9, 9, 9)), {1: CHAMBER}, r"must be 3D"),
        (np.full((9, 9, 9), 0.5), {1: CHAMBER}, r"whole numbers"),
        (ball(5), {1: Label("pair", components=2)}, r"label 1 \(pair\) has 1 components, 2 are intended"),
        (
            ball(5) + 2 * tube((12, 0, -5), (12, 0, 5), 1),
            {1: CHAMBER, 2: VESSEL},
            r"0 of 1 components touch label 1, all must",
        ),
        (1 + 1 * ball(4), {1: CHAMBER, 2: Label("core")}, r"label 1 \(chamber\) keeps 0 handles and 1 cavities"),
    ],
)
def test_what_cannot_be_prepared_is_refused_by_name(label, structures, message):
    with pytest.raises(ValueError, match=message):
        prepare_label_map(label, structures, spacing_mm=SPACING)


def test_impossible_intents_are_refused():
    with pytest.raises(ValueError, match=r"speck: components must be at least 1, got 0"):
        Label("speck", components=0)
    with pytest.raises(ValueError, match=r"ring: handles must not be negative, got -1"):
        Label("ring", handles=-1)
    with pytest.raises(ValueError, match=r"smoothing_mm must not be negative"):
        prepare_label_map(ball(3), {1: CHAMBER}, spacing_mm=SPACING, smoothing_mm=-1)
