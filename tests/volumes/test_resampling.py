"""Volumes at the spacing of the model: vessels stay in one piece, label volumes and contrast are kept."""

import numpy as np
import pytest
import torch
from custom.geometry.topology import betti_numbers
from custom.phantom.cohort import make_subject
from custom.volumes.reading import CheckVolumesd
from custom.volumes.resampling import ToSpacingd, resample_labels, working_spacing
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Spacingd

THIN = 2


def volume(values, spacing_mm=0.5, affine=None):
    affine = np.diag([*np.broadcast_to(spacing_mm, 3), 1.0]) if affine is None else affine
    return MetaTensor(torch.as_tensor(np.asarray(values, np.float32))[None], affine=torch.from_numpy(affine))


def moved(label, spacing_mm, thin_labels=(THIN,)):
    transform = ToSpacingd(
        ["label"], label_keys=["label"], spacing_mm=spacing_mm, follow="label", thin_labels=thin_labels
    )
    return transform({"label": label})["label"]


def nearest(label, spacing_mm):
    return Spacingd("label", pixdim=spacing_mm, mode="nearest")({"label": label})["label"]


def pieces(label, k=THIN):
    return betti_numbers(np.asarray(label[0]) == k)[0]


def volume_mm3(label, k):
    return float((label == k).sum()) * float(label.pixdim.prod())


def tree(shape=(70, 64, 61)):
    """A ball of label 1 with a tree of label 2 on it, of branches that taper from six voxels across to two."""
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)
    label = (np.linalg.norm(place - [20, 30, 30], axis=-1) < 15).astype(np.uint8)
    fork = np.array([45.0, 33, 30])
    for start, end, radii in (
        ([35, 30, 30], fork, (2.8, 2.2)),
        (fork, [64, 55, 43], (2.2, 1.0)),
        (fork, [66, 12, 20], (2.2, 1.0)),
        (fork, [55, 40, 56], (1.8, 1.0)),
    ):
        start, end = np.array(start, float), np.array(end, float)
        along = np.clip((place - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
        distance = np.linalg.norm(place - start - along[..., None] * (end - start), axis=-1)
        label[distance <= radii[0] + (radii[1] - radii[0]) * along] = THIN
    return label


@pytest.fixture(scope="module")
def vessels():
    label = volume(tree())
    assert pieces(label) == 1
    return label


# Working spacing


@pytest.mark.parametrize(
    ("pixdim", "spacing", "expected"),
    [
        ((0.4, 0.4, 0.6), (0.5, 1.0), 0.6),
        ((0.3, 0.3, 0.4), (0.5, 1.0), 0.5),
        ((0.4, 0.4, 3.0), (0.5, 1.0), 1.0),
        ((0.4, 0.4, 0.6), (0.8, 0.8), 0.8),
    ],
)
def test_limits_give_the_largest_edge_within_them(pixdim, spacing, expected):
    assert working_spacing(pixdim, spacing) == [expected] * 3


def test_three_lengths_are_taken_as_they_are():
    assert working_spacing((0.4, 0.4, 0.6), (1, 2.0, 0.5)) == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    "bad", [[1.0], [1.0, 0.5], [0, 1.0], [1.0, 1.0, -1.0], [1, 1, 1, 1], 1.5, [1.0, float("nan")], ["1", "2"]]
)
def test_other_forms_are_refused_everywhere_with_what_to_write(bad):
    message = r"spacing_mm must be three lengths .* or the finest and the coarsest .*write for example \[1\.5, 1\.5"
    for refuses in (
        lambda: working_spacing((1, 1, 1), bad),
        lambda: ToSpacingd("label", label_keys=["label"], spacing_mm=bad, follow="label"),
        lambda: CheckVolumesd("label", label_keys=["label"], num_labels=3, spacing_mm=bad),
    ):
        with pytest.raises(ValueError, match=message):
            refuses()


def test_the_volume_to_follow_decides_for_all():
    item = {"a": volume(np.zeros((30, 30, 30)), 0.6), "b": volume(np.zeros((20, 20, 20)), 0.9)}
    both = ToSpacingd(["a", "b"], label_keys=[], spacing_mm=[0.5, 0.8], follow="a")(item)
    np.testing.assert_allclose([both[key].pixdim.numpy() for key in "ab"], 0.6, rtol=1e-6)


def test_checks_compare_with_the_coarsest_of_the_limits():
    label = volume(np.ones((9, 9, 9)), 2.9)
    check = CheckVolumesd("label", label_keys=["label"], num_labels=2, spacing_mm=[0.5, 1.0])
    check({"label": label})
    with pytest.raises(ValueError, match=r"3\.1 times the model's \[1\.0, 1\.0, 1\.0\] mm"):
        check({"label": volume(np.ones((9, 9, 9)), 3.1)})


# Label maps


@pytest.mark.parametrize("spacing", [0.35, 0.8, 1.0, 1.5])
def test_a_tree_stays_in_one_piece_of_its_volume(vessels, spacing):
    new = moved(vessels, [spacing] * 3)
    assert pieces(new) == 1
    for k in (1, THIN):
        assert volume_mm3(new, k) == pytest.approx(volume_mm3(vessels, k), rel=0.1)


def test_nearest_reading_breaks_the_same_tree(vessels):
    assert pieces(nearest(vessels, [1.5] * 3)) > 1


@pytest.mark.parametrize("spacing", [(0.8, 1.2, 0.7), (0.4, 0.9, 1.5)])
def test_a_tree_stays_in_one_piece_on_oblique_grids_of_unequal_edges(spacing):
    turn = np.linalg.qr(np.array([[5.0, 1, 0], [-1, 5, 1], [0, 1, -5]]))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [0.5, 0.45, 0.6], [3, -50, 8]
    label = volume(tree(), affine=affine)
    new = moved(label, spacing)
    assert pieces(new) == 1
    assert volume_mm3(new, THIN) == pytest.approx(volume_mm3(label, THIN), rel=0.1)
    reference = nearest(label, spacing)
    assert new.shape == reference.shape
    torch.testing.assert_close(new.affine, reference.affine)
    overlap = 2 * ((new == 1) & (reference == 1)).sum() / ((new == 1).sum() + (reference == 1).sum())
    assert overlap > 0.95, "at the same place"


def test_thin_labels_that_are_not_named_are_read_as_the_others(vessels):
    assert pieces(moved(vessels, [1.5] * 3, thin_labels=())) > 1


def test_pieces_that_were_apart_stay_apart():
    label = np.zeros((60, 40, 40))
    label[5:55, 10:12, 20:22] = THIN
    label[5:55, 15:17, 20:22] = THIN  # 2.5 mm apart: a line of 1 mm fits between
    new = moved(volume(label), [1.0] * 3)
    assert pieces(new) == 2


def test_a_map_at_the_spacing_comes_back_bit_by_bit(vessels):
    assert torch.equal(moved(vessels, [0.5] * 3).as_tensor(), vessels.as_tensor())
    assert torch.equal(moved(vessels, [0.3, 0.9]).as_tensor(), vessels.as_tensor())


def test_staircases_become_smooth_when_refined():
    """A ball of 5 voxels across, at a third of its edges, is nearer to a ball than cubes are."""
    grid = np.stack(np.meshgrid(*[np.arange(11) - 5.0] * 3, indexing="ij"), -1)
    label = volume(np.linalg.norm(grid, axis=-1) <= 2.6, 1.5)
    radii = np.stack(np.meshgrid(*[np.arange(31) - 15.0] * 3, indexing="ij"), -1) / 3
    ball = torch.from_numpy(np.linalg.norm(radii, axis=-1) <= 2.6)
    ours, theirs = (f(label, [0.5] * 3)[0] == 1 for f in (moved, nearest))
    assert ours.shape == theirs.shape == ball.shape
    assert (ours ^ ball).sum() < 0.6 * (theirs ^ ball).sum()


def test_empty_maps_stay_empty_and_one_voxel_of_a_vessel_stays():
    assert not moved(volume(np.zeros((9, 8, 7))), [1.0] * 3).any()
    speck = np.zeros((9, 8, 7), np.uint8)
    speck[8, 0, 3] = THIN
    new = resample_labels(speck, np.diag([3.0, 3, 3, 1]), (3, 3, 2), [THIN])
    assert new.dtype == np.uint8
    assert (new == THIN).sum() == 1


def test_the_way_back_is_traced(vessels):
    chain = Compose([ToSpacingd("label", label_keys=["label"], spacing_mm=[0.8] * 3, follow="label")])
    item = chain({"label": vessels})
    item["pred"] = MetaTensor(item["label"].as_tensor().clone())
    back = Invertd("pred", chain, "label")(item)["pred"]
    assert back.shape == vessels.shape
    torch.testing.assert_close(back.affine, vessels.affine)
    assert float((back != vessels).float().mean()) < 0.03


# Images


def waves(shape, step):
    x, y, z = np.meshgrid(*(np.arange(n) * step for n in shape), indexing="ij")
    return 300 * np.sin(x) + 200 * np.cos(y) + 100 * np.sin(z + x)


def spaced_image(image, spacing_mm, **options):
    transform = ToSpacingd("image", label_keys=[], spacing_mm=spacing_mm, follow="image", **options)
    return transform({"image": image})["image"]


def test_coarser_images_are_those_of_monai():
    image = volume(waves((31, 29, 27), 0.5))
    theirs = Spacingd("image", pixdim=[0.8] * 3, mode="bilinear")({"image": image})["image"]
    assert torch.equal(spaced_image(image, [0.8] * 3), theirs)


def test_finer_images_are_cubic_and_closer_to_the_truth_unless_asked():
    image = volume(waves((15, 14, 13), 1.0), 1.0)
    theirs = Spacingd("image", pixdim=[0.5] * 3, mode="bilinear")({"image": image})["image"]
    ours, linear = spaced_image(image, [0.5] * 3), spaced_image(image, [0.5] * 3, linear_keys=["image"])
    inner, truth = (0, *[slice(4, -4)] * 3), torch.from_numpy(waves(ours.shape[1:], 0.5))[None]
    ours_off, theirs_off = ((x.as_tensor() - truth)[inner].abs().mean() for x in (ours, theirs))
    assert ours_off < theirs_off / 4
    assert ours.min() >= image.min()
    assert ours.max() <= image.max()
    assert torch.equal(linear, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [0.8, 1.0, 1.5])
def test_coronaries_of_a_phantom_keep_their_pieces(spacing):
    subject = make_subject(11, 0, shape=(160, 160, 160), spacing_mm=0.75)
    label = volume(subject.label, 0.75)
    new = moved(label, [spacing] * 3, thin_labels=(9,))
    assert pieces(new, 9) == pieces(label, 9)
    assert volume_mm3(new, 9) == pytest.approx(volume_mm3(label, 9), rel=0.1)
