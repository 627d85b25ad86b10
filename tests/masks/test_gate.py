"""Acceptance: every rule is broken by what it is meant against, says by how much, and can be switched off."""

from dataclasses import replace

import numpy as np
import pytest
from custom.masks.gate import MaskGate, mean_dice, measure_mask, rejections, wall_thickness_mm
from custom.volumes.anatomy import Label
from shapes import ball, torus, tube

STRUCTURES = {1: Label("chamber"), 2: Label("vessel", thin=True, touches=(1,)), 3: Label("wall", wall=True)}
SPACING = (1.0, 1.0, 1.0)
FINE = {"det_jacobian": 0.5, "dice": 0.7, "repaired": {1: 0.001}, "vessel_volume_ratio": {2: 1.0}}


def anatomy_map(chamber=None, vessel=None, wall=None):
    label = np.zeros(ball(1).shape, np.uint8)
    label[ball(10) & ~ball(6) if wall is None else wall] = 3
    label[ball(6) if chamber is None else chamber] = 1
    label[tube((0, 0, 5), (0, 0, 13), 1) if vessel is None else vessel] = 2
    return label


def broken(new=None, gate=None, **measured):
    source = measure_mask(anatomy_map(), STRUCTURES, SPACING)
    anatomy = source if new is None else measure_mask(new, STRUCTURES, SPACING)
    return rejections(anatomy, source, STRUCTURES, gate or MaskGate(), {**FINE, **measured})


def test_the_source_itself_breaks_nothing():
    assert broken() == []


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (anatomy_map(chamber=torus(4, 1)), "betti: label 1 (chamber) has (1, 1, 0), its source (1, 0, 0)"),
        (
            anatomy_map(vessel=tube((0, 0, 12), (0, 0, 13), 1)),
            "touches: 1 pieces of label 2 (vessel) do not touch label 1",
        ),
        (anatomy_map(chamber=ball(3)), "volume_ratio: label 1 (chamber) has 0.13, allowed [0.5, 2.0]"),
        (anatomy_map(chamber=ball(5), wall=ball(11) & ~ball(9)), "min_contact_mm2: chamber and wall share 0 mm2"),
        (anatomy_map(wall=ball(8)), "wall_thickness_ratio: label 3 (wall) has 0."),
        (np.where(anatomy_map() == 3, 0, anatomy_map()), "betti: label 3 (wall) has (0, 0, 0), its source"),
    ],
)
def test_each_change_of_anatomy_is_named(new, message):
    lines = broken(new, replace(MaskGate(), wall_thickness_ratio=(0.8, 1.25)))
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"det_jacobian": 0.05}, "min_det_jacobian: 0.050, at least 0.1"),
        ({"dice": 0.99}, "max_dice: 0.990 to a reference, at most 0.98"),
        ({"repaired": {1: 0.1}}, "max_repaired: 0.1000 of label 1 (chamber), at most 0.02"),
        ({"vessel_volume_ratio": {2: 1.3}}, "vessel_volume_ratio: label 2 (vessel) has 1.30, allowed [0.85, 1.15]"),
    ],
)
def test_each_measure_out_of_its_limit_is_named_and_can_be_switched_off(measured, message):
    assert broken(**measured) == [message]
    assert broken(gate=replace(MaskGate(), **{message.split(":")[0]: None}), **measured) == []


def test_topology_and_attachment_cannot_be_switched_off():
    off = MaskGate(**dict.fromkeys(MaskGate.__dataclass_fields__))
    assert [line.split(":")[0] for line in broken(anatomy_map(chamber=torus(4, 1)), gate=off)] == ["betti", "touches"]


def test_small_contacts_may_come_and_go():
    apart = anatomy_map(chamber=ball(5), wall=ball(11) & ~ball(9))
    touching = anatomy_map(chamber=ball(5) | tube((0, 0, 0), (9, 0, 0), 0.5), wall=ball(11) & ~ball(9))
    source = measure_mask(apart, STRUCTURES, SPACING)
    area = measure_mask(touching, STRUCTURES, SPACING).contacts_mm2[1, 3]
    assert 0 < area < 50

    def contact_lines(limit):
        new = measure_mask(touching, STRUCTURES, SPACING)
        return [
            line
            for line in rejections(new, source, STRUCTURES, replace(MaskGate(), min_contact_mm2=limit), FINE)
            if "contact" in line
        ]

    assert contact_lines(area + 1) == []
    assert contact_lines(area) == [f"min_contact_mm2: chamber and wall share {area:.0f} mm2, in the source 0"]


@pytest.mark.parametrize("thickness", [2, 4, 8])
def test_the_thickness_of_a_plate_is_its_thickness(thickness):
    plate = np.zeros((60, 60, 20), bool)
    plate[:, :, 5 : 5 + thickness] = True  # its rim is thinner: the mean over 60 x 60 voxels a little lower
    assert wall_thickness_mm(plate, SPACING) == pytest.approx(thickness, rel=0.1)
    assert wall_thickness_mm(plate, (2.0, 2.0, 2.0)) == pytest.approx(2 * thickness, rel=0.1)
    thick = np.repeat(plate, 2, axis=0)
    for axis in range(3):  # anisotropic voxels, and the plate along each axis
        spacing = np.roll([0.5, 1.0, 1.0], axis)
        turned = np.moveaxis(thick, [0, 1, 2], np.roll([0, 1, 2], -axis))
        assert wall_thickness_mm(turned, tuple(spacing)) == pytest.approx(thickness, rel=0.1)
    slices = np.zeros((60, 60, 12), bool)
    slices[20 : 20 + thickness] = True
    assert wall_thickness_mm(slices, (1.4, 1.4, 8.0)) == pytest.approx(1.4 * thickness, rel=0.1)
    assert np.isnan(wall_thickness_mm(np.zeros_like(plate), SPACING))


def test_mean_dice_is_over_labels_that_either_map_holds():
    a, b = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    a[0], b[0], a[2] = 1, 1, 2
    assert mean_dice(a, b, [1, 2, 3]) == pytest.approx(0.5)
    assert mean_dice(a, b, [3]) == 0.0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_dise": 0.9}, r"gate: \['max_dise'\] do not exist; the limits are \['min_det_jacobian'"),
        ({"volume_ratio": [2.0, 0.5]}, r"volume_ratio must be \[lowest, highest\] or null, got \[2.0, 0.5\]"),
        ({"max_dice": [0.5]}, r"max_dice must be a number or null, got \[0.5\]"),
        ({"volume_ratio": 0.5}, r"volume_ratio must be \[lowest, highest\] or null, got 0.5"),
        ({"volume_ratio": [0.5]}, r"volume_ratio must be \[lowest, highest\] or null"),
    ],
)
def test_unknown_limits_and_impossible_ranges_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        MaskGate.from_config(limits)


def test_limits_from_a_config_keep_the_defaults_they_do_not_name():
    gate = MaskGate.from_config({"volume_ratio": [0.7, 1.4], "max_dice": None})
    assert gate == replace(MaskGate(), volume_ratio=(0.7, 1.4), max_dice=None)
