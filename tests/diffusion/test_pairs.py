"""Training pairs: one appearance, two anatomies that meet away from the labels; grain is left to the scan."""

import math

import numpy as np
import pytest
import torch
from custom.diffusion.pairs import PooledDataLoader, RandTemplatePaird, near_labels
from custom.geometry.deformation import sample
from custom.volumes.intensity import label_statistics
from monai.data import MetaTensor

SIZE = (24, 22, 20)
SPACING_MM = [3.0, 3.0, 3.0]
AFFINE = torch.diag(torch.tensor([*SPACING_MM, 1.0], dtype=torch.float64))
LEVELS_HU = torch.tensor([-50.0, 100.0, 350.0])
ABSENT = (300.0, 12.0)  # statistics of label 3, which lies outside the crop
QUIET = {"contrast_shift_hu": 0.0, "label_shift_hu": 0.0, "blur_voxels": (0.0, 0.0)}
STILL = {"undeformed_prob": 1.0, "template_amplitude_mm": (0.0, 0.0)}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def anatomy(size=SIZE):
    label = torch.zeros(1, *size)
    label[:, 5:18, 5:17, 5:16] = 1
    label[:, 8:14, 8:14, 8:13] = 2
    return label


def make_item(label=None, structure=None, texture_hu=20.0, grain=None):
    label = anatomy() if label is None else label
    structure = LEVELS_HU[label.long()] if structure is None else structure
    image = structure + texture_hu * noise(*label.shape)
    statistics = torch.cat([label_statistics(image, label, 3), torch.tensor([ABSENT])])
    item = {"image": image, "label": label, "statistics": statistics, "case": "a"}
    return item if grain is None else item | {"grain": grain}


def pair(item, seed=0, **options):
    transform = RandTemplatePaird(**options)
    transform.set_random_state(seed=seed)
    result = transform({**item, "label": MetaTensor(item["label"], affine=AFFINE)})
    return {**result, "label": result["label"].as_tensor()}


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


def test_the_item_that_came_in_is_left_as_it_was():
    item = make_item(grain=noise(1, *SIZE, seed=1))
    pair(item)
    for key, value in make_item(grain=noise(1, *SIZE, seed=1)).items():
        assert torch.equal(item[key], value) if isinstance(value, torch.Tensor) else item[key] == value, key


@pytest.mark.parametrize("grain", [None, 30 * noise(1, *SIZE, seed=1)], ids=["training", "validation"])
def test_volumes_have_the_size_of_the_roi_and_the_scan_is_there_when_its_grain_was(grain):
    result = pair(make_item(grain=grain), roi_size=[8, 10, 12])
    volumes = {"image", "label", "template_image", "template_label"} | ({"scan"} if grain is not None else set())
    for key in volumes:
        assert result[key].shape == (1, 8, 10, 12), key
        assert result[key].dtype == torch.float32
    assert result.keys() == volumes | {"statistics", "case"}
    assert result["case"] == "a"


def test_what_else_is_known_of_a_case_is_handed_on():
    known = {"grain_spectrum": noise(1, 17, 17, 9), "grain_sd": noise(1, *SIZE), "noise_sd": 31.0}
    result = pair({**make_item(), **known})
    assert all(result[key] is value for key, value in known.items())


@pytest.mark.parametrize("seed", range(3))
def test_target_and_template_share_their_contrast(seed):
    """Drawn contrasts move label means by tens of HU, the two images of a pair by the same."""
    item = make_item()
    options = {"contrast_shift_hu": 150.0, "label_shift_hu": 60.0, "template_amplitude_mm": (0.0, 3.0)}
    result = pair(item, seed=seed, **options)
    target = means(result["image"], result["label"])
    template = means(result["template_image"], result["template_label"])
    assert (target - means(item["image"], item["label"]))[1:].abs().max() > 30
    assert (target - template).abs().max() < 10


def test_statistics_are_those_of_the_structure_in_its_new_contrast():
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


def test_a_template_that_has_not_moved_is_the_target():
    result = pair(make_item(), **STILL, contrast_shift_hu=100.0, label_shift_hu=40.0)
    torch.testing.assert_close(result["template_image"], result["image"], rtol=0, atol=0.1)
    assert torch.equal(result["template_label"], result["label"])


@pytest.mark.parametrize("deformed", [True, False])
def test_the_scan_is_the_target_with_its_own_grain_in_place(deformed):
    """Reading by splines is linear: the grain comes out as an image of nothing but grain would."""
    grain = 30 * noise(1, *SIZE, seed=1)
    options = {**QUIET, "undeformed_prob": float(not deformed), "roi_size": [12, 10, 8]}
    result = pair(make_item(grain=grain), **options)
    alone = pair(make_item() | {"image": grain}, **options)["image"]
    torch.testing.assert_close(result["scan"] - result["image"], alone, rtol=0, atol=0.05)
    assert torch.equal(alone, grain[:, 6:18, 6:16, 6:14]) is not deformed
    assert alone.std() > 10


def test_the_scan_has_the_contrast_and_the_blur_of_the_target_and_its_grain_is_not_blurred():
    grain = 30 * noise(1, *SIZE, seed=1)
    options = {**STILL, "contrast_shift_hu": 100.0, "label_shift_hu": 40.0, "blur_voxels": (1.0, 1.0)}
    result = pair(make_item(grain=grain), **options)
    torch.testing.assert_close(result["scan"] - result["image"], grain, rtol=0, atol=1e-3)
    assert (means(result["scan"], result["label"]) - means(result["image"], result["label"])).abs().max() < 5


def test_neither_image_of_a_pair_has_grain():
    grain = 30 * noise(1, *SIZE, seed=1)
    with_scan, without = pair(make_item(grain=grain)), pair(make_item())
    for key in ("image", "template_image", "statistics"):
        assert torch.equal(with_scan[key], without[key]), key


def test_blur_softens_both_images_alike():
    options = {**QUIET, **STILL}
    sharp, soft = (pair(make_item(), **{**options, "blur_voxels": (width, width)}) for width in (0.0, 1.0))
    for key in ("image", "template_image"):
        centre = (0, slice(9, 13), slice(9, 13), slice(9, 12))  # amid label 2: texture alone
        assert soft[key][centre].std() < 0.6 * sharp[key][centre].std()
    torch.testing.assert_close(soft["template_image"], soft["image"], rtol=0, atol=0.1)


def test_an_undeformed_target_is_the_scan_cut_from_its_centre():
    item, roi = make_item(), [8, 10, 12]
    result = pair(item, roi_size=roi, undeformed_prob=1.0, **QUIET)
    inside = (slice(None), slice(8, 16), slice(6, 16), slice(4, 16))
    assert torch.equal(result["label"], item["label"][inside])
    torch.testing.assert_close(result["image"], item["image"][inside])
    assert not torch.equal(result["template_label"], result["label"])


def test_a_deformed_target_moves_image_and_label_together():
    """Without texture, the image tells the labels: half-way between their levels lies the face."""
    item = make_item(texture_hu=0.0)
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
    item = make_item(label, structure, texture_hu=0.0)
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
        target_amplitude_mm=60.0, template_amplitude_mm=(4.0, 4.0), reach_mm=4.0, undeformed_prob=0
    )
    transform.set_random_state(seed=0)
    transform.randomize(2)
    target, template = transform._coordinates(label, SPACING_MM)
    near = near_labels(label, 4.0, SPACING_MM)
    away = sample(near, target) < 1e-4
    assert (away & (near > 0.2)).sum() > 50  # the target has moved
    motion = (template - target).norm(dim=1, keepdim=True)
    assert motion[away].max() < 1e-3
    assert motion[~away].mean() > 0.1


def test_pairs_drawn_at_random_are_undeformed_as_often_as_asked():
    transform = RandTemplatePaird(undeformed_prob=0.3, template_amplitude_mm=(1.0, 2.0))
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


def test_a_volume_smaller_than_the_roi_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"\(24, 22, 20\) voxels .* fewer than the ROI \(8, 24, 8\); lower `roi_size`"):
        pair(make_item(), roi_size=[8, 24, 8])


class Numbers(torch.utils.data.Dataset):
    """Item i holds i everywhere, and what no training step reads."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        volume = torch.full((1, 2, 2, 2), float(index))
        return {"image": volume, "prior": volume, "context": volume.repeat(4, 1, 1, 1), "label": volume, "case": "a"}


def drawn(uses, workers=0, **options):
    torch.manual_seed(0)
    loader = PooledDataLoader(Numbers(), uses=uses, batch_size=4, num_workers=workers, **options)
    return loader, list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_batch_of_pairs_is_drawn_itself_and_then_others_of_those_made_before(workers):
    loader, batches = drawn(3, workers)
    assert len(loader) == len(batches) == 9
    numbers = [batch["image"][:, 0, 0, 0, 0].tolist() for batch in batches]
    assert [numbers[0], numbers[3], numbers[6]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(max(part) < 4 for part in numbers[1:3])
    assert all(max(part) < 8 for part in numbers[4:6])
    assert len({tuple(part) for part in numbers}) > 5, "drawn at random"
    assert all(set(batch) == {"image", "prior", "context", "label"} for batch in batches)
    assert all((batch[key] == batch["image"]).all() for batch in batches for key in batch), "of one pair"


def test_the_pool_keeps_the_latest_pairs():
    numbers = [batch["label"][:, 0, 0, 0, 0].tolist() for batch in drawn(40, kept=4)[1]]
    assert {n for part in numbers[41:80] for n in part} == {4, 5, 6, 7}


def test_pairs_that_are_used_once_are_not_kept_and_an_epoch_follows_from_its_seed():
    once = [batch["image"].flatten().tolist() for batch in drawn(1)[1]]
    assert [part[0] for part in once] == [0, 4, 8]
    first, again = ([batch["image"] for batch in drawn(3)[1]] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
