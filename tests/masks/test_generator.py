"""Generated masks keep the topology of their source, for hearts and for a second organ by configuration alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from custom.geometry.deformation import jacobian_determinant, warp
from custom.geometry.topology import betti_numbers
from custom.geometry.vessels import read_tree, tree_length_mm
from custom.masks.gate import MaskGate
from custom.masks.generator import MaskGenerator, NotAcceptedError
from custom.masks.motion import Edits, Motion, from_options
from custom.masks.preparation import dice, prepare_label_map
from custom.masks.reference import Reference, fill_nearest, register_neighbour
from custom.phantom.cohort import make_subject
from custom.volumes.anatomy import Label
from helpers import ORGAN, airway, assert_kept
from shapes import torus

HEART = {k: Label(f"label {k}") for k in (2, 3, 4, 5, 6, 7, 8)} | {
    1: Label("myocardium", wall=True),
    9: Label("coronaries", components=2, thin=True, touches=(6,)),
    10: Label("pulmonary veins", components=4),
}
SPACING = (2.0, 2.0, 2.0)


@pytest.fixture(scope="module")
def phantoms():
    return [make_subject(0, index, shape=(72, 72, 72), spacing_mm=2.0).label for index in (0, 1, 2)]


@pytest.fixture(scope="module")
def generator(phantoms):
    return MaskGenerator(Reference(phantoms[0], HEART, spacing_mm=SPACING))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_new_heart_keeps_topology_attachment_and_vessels(generator, phantoms, index):
    made = generator((5, index))
    assert_kept(made.label_map, phantoms[0], HEART)
    assert jacobian_determinant(made.displacement).min() >= 0.1
    assert 0.2 < max(made.record["dice_to_references"]) < 0.98
    source, new = (read_tree(volume == 9, SPACING) for volume in (phantoms[0], made.label_map))
    areas = [(volume == 9).sum() / tree_length_mm(t) for volume, t in ((phantoms[0], source), (made.label_map, new))]
    assert areas[1] == pytest.approx(areas[0], rel=0.2)  # 2 mm voxels: vessels are one voxel wide
    assert made.record["betti"] == {str(k): list(betti_numbers(made.label_map == k)) for k in HEART}


def test_a_mask_depends_on_its_seed_alone(generator, phantoms):
    first = generator((5, 0))
    generator((5, 1))
    again = MaskGenerator(Reference(phantoms[0], HEART, spacing_mm=SPACING))((5, 0))
    np.testing.assert_array_equal(first.label_map, again.label_map)
    assert first.record == again.record
    assert (first.label_map != generator((6, 0)).label_map).mean() > 0.01


def test_another_organ_works_by_configuration_alone():
    label = airway()
    prepared, report = prepare_label_map(label, ORGAN, spacing_mm=(1.0, 1.0, 1.0))
    assert report[2]["betti_after"] == (1, 0, 0)
    motion = Motion(coarse_mm=4.0, fine_mm=1.0, margin_mm=8.0)
    generator = MaskGenerator(Reference(prepared, ORGAN, spacing_mm=(1.0, 1.0, 1.0)), motion=motion)
    for index in range(3):
        new = generator((0, index)).label_map
        assert_kept(new, prepared, ORGAN)
        assert dice(new == 2, prepared == 2) < 0.95


def chamber_overlap(a, b):
    return np.mean([dice(a == k, b == k) for k in (1, 2, 3, 4, 5)])


def test_one_neighbour_pulls_a_mask_towards_it(phantoms):
    reference = Reference(phantoms[0], HEART, spacing_mm=SPACING)
    neighbour = register_neighbour(phantoms[0], phantoms[1], HEART, SPACING)
    still = Motion(coarse_mm=0.0, fine_mm=0.0)
    made = MaskGenerator(reference, [neighbour], motion=still)((0, 2))
    assert made.record["coefficients"][0] > 0.3
    assert_kept(made.label_map, phantoms[0], HEART)
    before = chamber_overlap(phantoms[0], neighbour.label_map)
    assert chamber_overlap(made.label_map, neighbour.label_map) > before + 0.03


def test_two_neighbours_are_mixed(phantoms):
    reference = Reference(phantoms[0], HEART, spacing_mm=SPACING)
    neighbours = [register_neighbour(phantoms[0], other, HEART, SPACING) for other in phantoms[1:]]
    made = MaskGenerator(reference, neighbours, motion=Motion(coarse_mm=0.0, fine_mm=0.0))((0, 3))
    assert len(made.record["coefficients"]) == len(made.record["z"]) == 2
    assert len(made.record["dice_to_references"]) == 3
    assert_kept(made.label_map, phantoms[0], HEART)
    assert chamber_overlap(made.label_map, phantoms[0]) < 0.98


def test_without_motion_the_copy_is_refused_and_the_rule_named(phantoms):
    still = Motion(coarse_mm=0.0, fine_mm=0.0, retries=2)
    generator = MaskGenerator(Reference(phantoms[0], HEART, spacing_mm=SPACING), motion=still)
    with pytest.raises(
        NotAcceptedError, match=r"no mask accepted for seed \(0, 0\) after 3 draws \(scale 1.00: max_dice: "
    ):
        generator((0, 0))


def test_each_retry_moves_less(phantoms):
    reference = Reference(phantoms[0], HEART, spacing_mm=SPACING)
    generator = MaskGenerator(reference, motion=Motion(shrink=0.5))
    lengths = [generator.draw_velocity((0, 0), attempt)[0].norm(dim=1).mean() for attempt in range(3)]
    assert lengths[2] < lengths[1] < lengths[0]
    gate = replace(MaskGate(), min_det_jacobian=0.6)
    made = MaskGenerator(reference, motion=Motion(shrink=0.5, retries=8), gate=gate)((0, 0))
    assert made.record["retries"] > 0
    assert "min_det_jacobian" in made.record["attempts"][0]["rejected"][0]
    assert made.record["scale"] == 0.5 ** made.record["retries"]


def test_edits_change_vessels_and_keep_a_forest(generator, phantoms):
    edits = Edits(prune_probability=1.0, prune_max_length_mm=200.0, radius_range=(1.4, 1.4))
    edited = MaskGenerator(generator.reference, edits=edits)((5, 0))
    assert_kept(edited.label_map, phantoms[0], HEART)
    vessels, plain = edited.record["vessels"]["9"], generator((5, 0)).record["vessels"]["9"]
    assert vessels["pruned_branches"] > 0
    assert vessels["length_mm"] < plain["length_mm"]
    assert vessels["radius_factor"] == pytest.approx(1.4)


def test_labels_that_touch_the_border_stay_on_the_grid(phantoms):
    cut = phantoms[0][:, :, 20:]  # through ventricles and aorta
    structures = {k: replace(s, components=betti_numbers(cut == k)[0]) for k, s in HEART.items() if (cut == k).any()}
    prepared, _ = prepare_label_map(cut, structures, spacing_mm=SPACING)
    made = MaskGenerator(Reference(prepared, structures, spacing_mm=SPACING))((0, 0))
    assert_kept(made.label_map, prepared, structures)
    assert (made.label_map[:, :, 0] == 6).any()


def test_a_vessel_with_a_loop_is_no_tree():
    structures = {1: Label("ring", thin=True, handles=1)}
    with pytest.raises(
        ValueError, match=r"label 1 \(ring\) has Betti numbers \(1, 1, 0\); a vessel is drawn as a tree"
    ):
        Reference(torus().astype(np.uint8), structures, spacing_mm=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Motion(shrink=0), r"shrink must be in \(0, 1\] and retries at least 0, got 0, 6"),
        (lambda: Motion(fine_mm=-1), r"motion: fine_mm must not be negative, got -1"),
        (lambda: Motion(coarse_sigma_mm=0), r"motion: coarse_sigma_mm must be positive, got 0"),
        (lambda: Motion(fine_sigma_mm=1).check_grid([2, 2, 2.5]), r"fine_sigma_mm must be .* 2.5 mm, got 1; raise it"),
        (lambda: from_options(Motion, "motion", {"fine_mm": True}), r"motion: fine_mm must be a number, .* got True"),
        (lambda: Edits(prune_probability=2), r"edits: prune_probability must be 0 to 1 .* got 2 and 40"),
        (lambda: Edits(radius_range=(2, 1)), r"edits: radius_range must be \[lowest, highest\] above 0, got \(2, 1\)"),
    ],
)
def test_impossible_motion_and_edits_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_trees_that_cross_far_from_their_roots_are_severed_and_refused():
    """Two thin vessels that meet when drawn thicker: grown from their roots, one would lose its end to the other."""
    label = np.zeros((30, 30, 40), np.uint8)
    label[5:25, 5:25, 30:36] = 1
    label[8, 14, 4:30], label[20, 14, 6:30] = 2, 2
    label[8:26, 14, 4] = 2  # the longer one bends and passes below the end of the other
    structures = {1: Label("heart"), 2: Label("vessels", components=2, thin=True, touches=(1,))}
    reference = Reference(label, structures, spacing_mm=(1.0, 1.0, 1.0))
    thick = Edits(radius_range=(2.0, 2.0))
    gate = MaskGate(**dict.fromkeys(MaskGate.__dataclass_fields__))
    still = Motion(coarse_mm=0, fine_mm=0, retries=0)
    with pytest.raises(NotAcceptedError, match=r"severed: 0\.\d\d of tree [01] of label 2 are cut off"):
        MaskGenerator(reference, motion=still, edits=thick, gate=gate)((0, 0))


@pytest.mark.parametrize(
    ("label", "structures", "message"),
    [
        (np.ones((8, 8, 1), np.uint8), {1: Label("a")}, r"two voxels along each axis, got \(8, 8, 1\)"),
        (np.pad(np.ones((3, 3, 3), np.uint8), 4), {1: Label("blob", thin=True)}, r"label 1 \(blob\) has no length"),
        (
            np.pad(np.ones((3, 3, 3), np.uint8), 4),
            {1: Label("a", touches=(2,)), 2: Label("b")},
            r"label 1 \(a\) must touch \[2\], which the map does not hold",
        ),
    ],
)
def test_references_that_cannot_be_deformed_are_refused(label, structures, message):
    with pytest.raises(ValueError, match=message):
        Reference(label, structures, spacing_mm=(1.0, 1.0, 1.0))


def test_a_map_without_background_is_deformed():
    label = np.ones((20, 20, 20), np.uint8)
    label[:, :, 10:] = 2
    structures = {1: Label("low"), 2: Label("high")}
    made = MaskGenerator(Reference(label, structures, spacing_mm=(2.0, 2.0, 2.0)))((0, 0))
    assert set(np.unique(made.label_map)) == {1, 2}


def test_intended_cavities_stay():
    label = np.zeros((30, 30, 30), np.uint8)
    label[5:25, 5:25, 5:25] = 1
    label[12:18, 12:18, 12:18] = 0
    reference = Reference(label, {1: Label("shell", keep=True)}, spacing_mm=(1.0, 1.0, 1.0))
    made = MaskGenerator(reference, motion=Motion(coarse_mm=3, fine_mm=1, margin_mm=5))((0, 0))
    assert betti_numbers(made.label_map == 1) == (1, 0, 1)


def test_removed_voxels_take_the_nearest_label():
    label = np.zeros((9, 9, 9), np.uint8)
    label[:5], label[5:] = 1, 2
    label[4, 4, 4] = 7
    filled = fill_nearest(label, label == 7)
    assert set(np.unique(filled)) == {1, 2}
    np.testing.assert_array_equal(filled[label != 7], label[label != 7])


def test_warping_an_image_with_the_displacement_follows_the_mask(generator, phantoms):
    made = generator((5, 0))
    source = torch.from_numpy((phantoms[0] == 3).astype(np.float32))[None, None]
    moved = warp(source, made.displacement)[0, 0].numpy() > 0.5
    assert dice(moved, made.label_map == 3) > 0.97
