"""Training pairs: one appearance, two anatomies that meet away from the labels, and no grain in common."""

import math

import numpy as np
import pytest
import torch
from custom.diffusion.pairs import RandTemplatePaird, near_labels
from custom.geometry.deformation import sample
from custom.volumes.intensity import label_statistics

SIZE = (24, 22, 20)
SPACING_MM = [3.0, 3.0, 3.0]
LEVELS_HU = torch.tensor([-50.0, 100.0, 350.0])
ABSENT = (300.0, 12.0)  # statistics of label 3, which lies outside the crop
QUIET = {"contrast_shift_hu": 0.0, "label_shift_hu": 0.0, "grain_gain": (1.0, 1.0), "blur_voxels": (0.0, 0.0)}
STILL = {"undeformed_prob": 1.0, "template_amplitude_mm": (0.0, 0.0)}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def anatomy(size=SIZE):
    label = torch.zeros(1, *size)
    label[:, 5:18, 5:17, 5:16] = 1
    label[:, 8:14, 8:14, 8:13] = 2
    return label


def make_item(label=None, structure=None, grain_hu=20.0):
    label = anatomy() if label is None else label
    structure = LEVELS_HU[label.long()] if structure is None else structure
    image = structure + grain_hu * noise(*label.shape)
    statistics = torch.cat([label_statistics(image, label, 3), torch.tensor([ABSENT])])
    return {
        "image": image,
        "structure": structure,
        "surrogate": grain_hu * noise(*label.shape, seed=1),
        "label": label,
        "statistics": statistics,
        "grain_sd": 20.0,
        "case": "a",
    }


def pair(item, seed=0, **options):
    transform = RandTemplatePaird(spacing_mm=SPACING_MM, **options)
    transform.set_random_state(seed=seed)
    return transform(item)


def means(image, label):
    return torch.stack([image[label == index].mean() for index in range(3)])


def test_a_seed_fixes_the_pair_and_another_gives_another():
    torch.manual_seed(1)
    first = pair(make_item())
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = pair(make_item()), pair(make_item(), seed=1)
    for key in ("image", "label", "template_image", "template_label", "statistics"):
        assert torch.equal(first[key], again[key]), key
        assert not torch.equal(first[key], other[key]), key
    assert first["grain_sd"] == again["grain_sd"] != other["grain_sd"]


def test_the_item_that_came_in_is_left_as_it_was():
    item = make_item()
    pair(item)
    for key, value in make_item().items():
        assert torch.equal(item[key], value) if isinstance(value, torch.Tensor) else item[key] == value, key


def test_volumes_have_the_size_of_the_roi_and_what_made_them_is_gone():
    result = pair(make_item(), roi_size=[8, 10, 12])
    for key in ("image", "label", "template_image", "template_label"):
        assert result[key].shape == (1, 8, 10, 12), key
        assert result[key].dtype == torch.float32
    assert result.keys() == make_item().keys() - {"structure", "surrogate"} | {"template_image", "template_label"}
    assert result["case"] == "a"


@pytest.mark.parametrize("seed", range(3))
def test_target_and_template_share_their_contrast(seed):
    """Drawn contrasts move label means by tens of HU, the two images of a pair by the same."""
    item = make_item()
    result = pair(item, seed=seed, contrast_shift_hu=150.0, label_shift_hu=60.0)
    target = means(result["image"], result["label"])
    template = means(result["template_image"], result["template_label"])
    assert (target - means(item["image"], item["label"]))[1:].abs().max() > 30
    assert (target - template).abs().max() < 10


def test_statistics_are_those_of_the_scan_in_its_new_contrast():
    item = make_item()
    result = pair(item, **STILL)
    image, label = result["image"], item["label"]
    for index in range(3):
        inside = image[label == index]
        torch.testing.assert_close(result["statistics"][index], torch.stack([inside.mean(), inside.std(correction=0)]))
    assert (result["statistics"] - item["statistics"])[1:, 0].abs().max() > 5


def test_contrast_moves_filled_labels_alone_and_absent_ones_by_their_statistics():
    item = make_item()
    result = pair(item, **{**QUIET, **STILL, "contrast_shift_hu": 100.0})
    change = (result["image"] - item["image"])[0]
    shift = change[11, 11, 10]  # amid label 2
    assert shift.abs() > 20
    assert change[6, 6, 6].abs() < 1e-3  # label 1 is muscle
    assert change[1, 1, 1].abs() < 1e-3
    torch.testing.assert_close(result["statistics"][3], torch.tensor([ABSENT[0] + shift, ABSENT[1]]))


def test_label_shifts_move_every_label_by_its_own_and_never_the_background():
    item = make_item()
    change = (pair(item, **{**QUIET, **STILL, "label_shift_hu": 50.0})["image"] - item["image"])[0]
    assert change[1, 1, 1].abs() < 1e-3
    assert change[6, 6, 6].abs() > 5
    assert (change[11, 11, 10] - change[6, 6, 6]).abs() > 5


def test_template_wears_rolled_surrogate_grain_and_not_the_grain_of_the_scan():
    item = make_item()
    result = pair(item, **QUIET, **STILL)
    torch.testing.assert_close(result["image"], item["image"])
    grain = item["image"] - item["structure"]
    worn = result["template_image"] - item["structure"]
    torch.testing.assert_close(
        worn.flatten().sort().values, item["surrogate"].flatten().sort().values, rtol=0, atol=0.1
    )
    for known in (grain, item["surrogate"]):  # 10 560 voxels: correlations of independent noise have an sd of 0.01
        assert abs(float(torch.corrcoef(torch.stack([worn.flatten(), known.flatten()]))[0, 1])) < 0.05


def test_gain_scales_the_grain_of_both_and_its_strength():
    item = make_item()
    result = pair(item, **{**QUIET, **STILL, "grain_gain": (1.5, 1.5)})
    grain = item["image"] - item["structure"]
    torch.testing.assert_close(result["image"], item["structure"] + 1.5 * grain)
    worn = result["template_image"] - item["structure"]
    torch.testing.assert_close(worn.std(), 1.5 * item["surrogate"].std(), rtol=1e-3, atol=0)
    assert result["grain_sd"] == 30.0


def test_an_undeformed_target_is_the_scan_cut_from_its_centre():
    item, roi = make_item(), [8, 10, 12]
    result = pair(item, roi_size=roi, undeformed_prob=1.0, **QUIET)
    inside = (slice(None), slice(8, 16), slice(6, 16), slice(4, 16))
    assert torch.equal(result["label"], item["label"][inside])
    torch.testing.assert_close(result["image"], item["image"][inside])
    assert not torch.equal(result["template_label"], result["label"])


def test_a_deformed_target_moves_image_and_label_together():
    """Without grain, the image tells the labels: half-way between their levels lies the face."""
    item = make_item(grain_hu=0.0)
    result = pair(item, undeformed_prob=0.0, target_amplitude_mm=6.0, **QUIET)
    for image, label in (("image", "label"), ("template_image", "template_label")):
        moved, read = result[label] > 0, result[image] > 25
        assert (moved != (item["label"] > 0)).sum() > 300
        assert (moved != read).sum() < 0.05 * moved.sum()
        assert set(result[label].unique().tolist()) == {0.0, 1.0, 2.0}


def test_target_and_template_agree_far_from_labels_and_differ_near_them():
    """Labels fill 8 of 48 voxels of 3 mm; at 8 standard deviations nothing is left of the template's own motion."""
    label = torch.zeros(1, 48, 16, 16)
    label[:, :8] = 1
    axes = torch.meshgrid(*[torch.arange(n) * 0.5 for n in label.shape[1:]], indexing="ij")
    structure = 200 * sum(axis.sin() for axis in axes)[None]
    item = make_item(label, structure, grain_hu=0.0)
    options = {"undeformed_prob": 0.0, "template_amplitude_mm": (4.0, 4.0), "reach_mm": 9.0, "sigma_mm": 25.0}
    result = pair(item, **options, **QUIET)
    difference = (result["image"] - result["template_image"]).abs()
    assert difference[:, 34:].max() < 0.1
    assert difference[:, :10].mean() > 10
    assert (result["image"] - item["image"])[:, 34:].abs().mean() > 10  # the target itself has moved there


def test_motion_fades_away_from_the_labels_where_the_deformed_target_has_them():
    label = torch.zeros(1, 1, 32, 16, 16)
    label[:, :, 10:16] = 1
    transform = RandTemplatePaird(
        spacing_mm=SPACING_MM,
        target_amplitude_mm=60.0,
        template_amplitude_mm=(4.0, 4.0),
        reach_mm=4.0,
        undeformed_prob=0,
    )
    transform.set_random_state(seed=0)
    transform.randomize(2)
    target, template = transform._coordinates(label)
    near = near_labels(label, 4.0, SPACING_MM)
    away = sample(near, target) < 1e-4
    assert (away & (near > 0.2)).sum() > 50  # the target has moved
    motion = (template - target).norm(dim=1, keepdim=True)
    assert motion[away].max() < 1e-3
    assert motion[~away].mean() > 0.1


def test_pairs_drawn_at_random_are_undeformed_as_often_as_asked():
    transform = RandTemplatePaird(spacing_mm=SPACING_MM, undeformed_prob=0.3, template_amplitude_mm=(1.0, 2.0))
    transform.set_random_state(seed=0)
    deformed, amplitudes = [], []
    for _ in range(1000):
        transform.randomize(3)
        deformed.append(transform._deformed)
        amplitudes.append(transform._amplitude_mm)
    assert np.mean(deformed) == pytest.approx(0.7, abs=0.05)
    assert 1 <= min(amplitudes) < 1.05
    assert 1.95 < max(amplitudes) <= 2


def half_space(voxels=48, filled=24):
    label = torch.zeros(1, 1, voxels, 24, 24)
    label[:, :, :filled] = 3
    return label


def test_near_labels_is_one_at_labels_and_zero_far_away():
    near = near_labels(half_space(), 9.0, SPACING_MM)
    assert near.shape == (1, 1, 48, 24, 24)
    profile = near[0, 0, :, 12, 12]
    torch.testing.assert_close(profile[4:23], torch.ones(19))
    assert profile[-6:].max() < 1e-3  # 54 mm and more
    assert (profile[22:].diff() <= 1e-6).all()


@pytest.mark.parametrize("reach_mm", [12.0, 18.0])
def test_near_labels_falls_by_the_gaussian_of_its_reach(reach_mm):
    """From a face: 2 Phi(-distance / reach), blurred by blocks of 12 mm."""
    profile = near_labels(half_space(), reach_mm, SPACING_MM)[0, 0, :, 12, 12]
    for voxels in (4, 6, 8):
        expected = math.erfc(voxels * 3.0 / reach_mm / 2**0.5)
        assert float(profile[23 + voxels : 25 + voxels].mean()) == pytest.approx(expected, abs=0.06)


def test_near_labels_counts_millimetres_and_takes_odd_sizes():
    label = half_space()[:, :, :, :23, :21]
    coarse = near_labels(label, 9.0, SPACING_MM)[0, 0, :, 11, 11]
    fine = near_labels(label, 9.0, [1.5, 3.0, 3.0])[0, 0, :, 11, 11]
    assert fine.shape == coarse.shape == (48,)
    assert fine[32] > coarse[32] + 0.1
    assert not near_labels(torch.zeros(1, 1, 9, 8, 7), 9.0, SPACING_MM).any()
