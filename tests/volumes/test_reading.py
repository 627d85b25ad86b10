"""Volumes that would train or render nonsense are refused by name; good ones pass untouched."""

import gzip

import custom
import nibabel as nib
import numpy as np
import pytest
import torch
from custom.checks import check_version
from custom.geometry.topology import betti_numbers
from custom.volumes.reading import CheckVolumesd, LoadConfidenced, LoadVolumesd, file_of, reading_chain
from monai.data import MetaTensor
from monai.transforms import Compose, Spacingd

SHAPE = (6, 5, 7)
LARGER = (17, 16, 15)


def volume(values, name="case.nii.gz", affine=None):
    affine = torch.eye(4, dtype=torch.float64) if affine is None else torch.as_tensor(affine, dtype=torch.float64)
    return MetaTensor(torch.as_tensor(values).float(), affine=affine, meta={"filename_or_obj": f"/data/{name}"})


def ct(name="ct.nii.gz", affine=None, shape=SHAPE):
    return volume(np.linspace(-1000, 500, np.prod(shape)).reshape(1, *shape), name, affine)


def mask(name="mask.nii.gz", affine=None, shape=SHAPE, **voxels):
    values = np.zeros((1, *shape))
    values[0, 1:4, 1:4, 1:4] = 1
    values[0, 2, 2, 2] = voxels.get("centre", 2)
    return volume(values, name, affine)


def check(image=None, label=None, **options):
    item = {"image": ct() if image is None else image, "label": mask() if label is None else label}
    options = {"label_keys": ["label"], "num_labels": 3, **options}
    return CheckVolumesd(["image", "label"], **options)(item)


def spaced(*spacing_mm):
    return np.diag([*spacing_mm, 1.0])


def test_file_of_reads_the_name_and_says_when_there_is_none():
    assert file_of(ct()) == "/data/ct.nii.gz"
    assert file_of(torch.zeros(1)) == file_of(None) == "volume without a file"


def test_good_volumes_pass_unchanged():
    item = {"image": ct(), "label": mask(), "case": "a"}
    checks = CheckVolumesd(
        ["image", "label"], label_keys=["label"], num_labels=3, spacing_mm=[1, 1, 1], grids=[["image", "label"]]
    )
    result = checks(item)
    assert result is not item
    assert result.keys() == item.keys()
    assert all(result[key] is item[key] for key in item)
    assert torch.equal(result["image"], ct())


def test_a_missing_key_is_named():
    with pytest.raises(KeyError, match="label"):
        CheckVolumesd(["image", "label"], label_keys=["label"], num_labels=3)({"image": ct()})


@pytest.mark.parametrize("shape", [(2, *SHAPE), (1, *SHAPE, 3), (3, *SHAPE), SHAPE])
def test_anything_but_one_channel_of_3d_is_refused(shape):
    with pytest.raises(ValueError, match=r"/data/x\.nii: must be one 3D volume of one channel, got .*\(") as caught:
        check(image=volume(np.linspace(-1000, 500, np.prod(shape)).reshape(shape), "x.nii"))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["image", "label"])
def test_voxels_that_are_not_finite_are_refused(key, bad):
    values = {"image": ct, "label": mask}[key]("bad.nii.gz")
    values[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"/data/bad\.nii\.gz: holds NaN or infinite voxels"):
        check(**{key: values})


@pytest.mark.parametrize("value", [0.0, -1000.0])
def test_constant_image_is_refused_with_its_value(value):
    with pytest.raises(ValueError, match=rf"/data/flat\.nii: every voxel is {value:g}; a constant image cannot"):
        check(image=volume(np.full((1, *SHAPE), value), "flat.nii"))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 255), (0, 4095), (-1, 1), (-149, 3000), (-4001, 500), (-1000, 40001)],
    ids=["8-bit", "unsigned", "normalised", "no air", "too low", "too high"],
)
def test_values_that_are_not_hu_are_refused_with_their_range(low, high):
    with pytest.raises(ValueError, match=rf"/data/x\.nii: values {low} to {high} are not Hounsfield units.*rescale"):
        check(image=volume(np.linspace(low, high, 210).reshape(1, *SHAPE), "x.nii"))


@pytest.mark.parametrize(("low", "high"), [(-150, 100), (-4000, 40000), (-1024, 3071)])
def test_hu_up_to_the_limits_pass(low, high):
    check(image=volume(np.linspace(low, high, 210).reshape(1, *SHAPE)))


def test_the_level_of_air_can_be_set():
    image = volume(np.linspace(-100, 500, 210).reshape(1, *SHAPE))
    check(image=image, air_below_hu=-50)
    with pytest.raises(ValueError, match="between -4000 and -150"):
        check(image=image)


@pytest.mark.parametrize(("bad", "listed"), [(3, r"\[3\]"), (-2, r"\[-2\]"), (500, r"\[500\]")])
def test_unknown_label_ids_are_listed(bad, listed):
    with pytest.raises(ValueError, match=rf"/data/mask\.nii\.gz: label ids {listed} are not in the label map 0 to 2"):
        check(label=mask(centre=bad))


def test_label_ids_between_integers_are_listed():
    with pytest.raises(ValueError, match=r"/data/mask\.nii\.gz: label ids must be integers, got \[1\.5\]"):
        check(label=mask(centre=1.5))


def test_empty_mask_is_refused_and_a_full_one_passes():
    with pytest.raises(ValueError, match=r"/data/none\.nii: the mask is empty"):
        check(label=volume(np.zeros((1, *SHAPE)), "none.nii"))
    check(label=volume(np.ones((1, *SHAPE))))


def test_labels_are_not_measured_in_hu_nor_images_against_the_label_map():
    """The mask has no air and the image has values beyond the label map; both are right where they are."""
    check()
    with pytest.raises(ValueError, match="not Hounsfield units"):
        check(label_keys=[])


def test_spacing_up_to_three_times_the_model_passes_and_beyond_is_refused():
    check(image=ct(affine=spaced(1, 3, 1)), spacing_mm=[1, 1, 1])
    with pytest.raises(ValueError, match=r"/data/ct\.nii\.gz: spacing \[1\.0, 3\.5, 1\.0\] mm is 3\.5 times the model"):
        check(image=ct(affine=spaced(1, 3.5, 1)), spacing_mm=[1, 1, 1])


def test_spacing_is_left_alone_without_a_model_spacing_or_an_affine():
    check(image=ct(affine=spaced(9, 9, 9)))
    check(image=torch.as_tensor(ct().numpy()), spacing_mm=[0.1, 0.1, 0.1], label=torch.as_tensor(mask().numpy()))


def test_spacing_of_a_turned_volume_is_compared_along_the_axes_of_the_model():
    """Slices of 4 mm along the first axis of the file are the last axis of the model."""
    turned = np.array([[0, 0, -1, 0], [0, 1, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1.0]])
    image, label = ct(affine=turned), mask(affine=turned)
    check(image=image, label=label, spacing_mm=[1, 1, 4])
    with pytest.raises(ValueError, match=r"4\.0 times the model's \[1\.0, 1\.0, 1\.0\] mm"):
        check(image=image, label=label, spacing_mm=[1, 1, 1])
    with pytest.raises(ValueError, match=r"4\.0 times the model's \[1\.0, 1\.0, 4\.0\] mm"):
        check(image=ct(affine=spaced(4, 1, 4)), label=label, spacing_mm=[1, 1, 4])


@pytest.mark.parametrize("spacing", [(0.001, 0.001, 0.001), (1, 1, 0.2)])
def test_volumes_thinner_than_two_voxels_of_the_model_are_refused(spacing):
    with pytest.raises(
        ValueError, match=r"/data/ct\.nii\.gz: \(6, 5, 7\) voxels of spacing .* fewer than 2 of the model"
    ):
        check(image=ct(affine=spaced(*spacing)), spacing_mm=[1, 1, 1])


def test_volumes_of_two_voxels_of_the_model_pass():
    check(image=ct(affine=spaced(0.4, 0.4, 0.4)), spacing_mm=[1, 1, 1])  # 5 * 0.4 = 2


def test_pairs_of_different_size_are_refused_with_both_names_and_sizes():
    """And with nothing else: where corners lie was not compared."""
    with pytest.raises(
        ValueError, match=r"ct\.nii\.gz and /data/mask\.nii\.gz: .*got sizes \(6, 5, 7\) and \(6, 5, 8\); resample"
    ):
        check(label=mask(shape=(6, 5, 8)), grids=[["image", "label"]])


def test_pairs_at_different_places_are_refused_with_both_affines():
    moved = spaced(1, 1, 1)
    moved[0, 3] = 5
    with pytest.raises(
        ValueError, match=r"ct\.nii\.gz and /data/mask\.nii\.gz: .* affines that put a corner 5 mm apart; resample"
    ):
        check(label=mask(affine=moved), grids=[["image", "label"]])


def test_affines_within_a_tenth_of_a_voxel_are_one_grid():
    moved = spaced(0.5, 1, 1)
    moved[0, 3] = 0.04
    check(image=ct(affine=spaced(0.5, 1, 1)), label=mask(affine=moved), grids=[["image", "label"]])
    moved[0, 3] = 0.06
    with pytest.raises(ValueError, match=r"affines that put a corner 0\.06 mm apart"):
        check(image=ct(affine=spaced(0.5, 1, 1)), label=mask(affine=moved), grids=[["image", "label"]])


def test_a_small_turn_or_spacing_that_moves_the_far_corner_is_another_grid():
    angle, turned, stretched = np.deg2rad(3), spaced(1, 1, 1), spaced(1, 1, 1)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    stretched[2, 2] = 1.03  # 6 voxels from the first
    for affine, apart in ((turned, 2 * np.hypot(5, 4) * np.sin(angle / 2)), (stretched, 0.18)):
        with pytest.raises(ValueError, match=f"affines that put a corner {apart:.3g} mm apart"):
            check(label=mask(affine=affine), grids=[["image", "label"]])


def test_only_the_declared_pairs_must_share_a_grid():
    check(label=mask(shape=(6, 5, 8)))


@pytest.fixture
def readable(tmp_path):
    path = tmp_path / "good.nii.gz"
    values = np.random.default_rng(0).integers(-1000, 1000, LARGER, dtype=np.int16)
    nib.save(nib.Nifti1Image(values, spaced(1, 2, 3)), path)
    return path


def test_volumes_are_read_with_name_and_affine_and_other_entries_kept(readable):
    item = {"image": str(readable), "case": "a"}
    result = LoadVolumesd("image")(item)
    np.testing.assert_array_equal(result["image"], np.asarray(nib.load(readable).dataobj))
    np.testing.assert_array_equal(result["image"].affine, spaced(1, 2, 3))
    assert file_of(result["image"]) == str(readable)
    assert result["case"] == "a"
    assert item["image"] == str(readable)


def test_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.nii\.gz"):
        LoadVolumesd("image")({"image": str(tmp_path / "nowhere.nii.gz")})


def colours():
    return np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content[: len(content) // 2], "ended before the end-of-stream"),
        (lambda content: gzip.compress(gzip.decompress(content)[:2352]), "Expected 8160 bytes, got 2000 bytes"),
        (lambda content: b"no nifti" * 40, "not a gzip file"),
        (lambda content: b"", "Empty file"),
        (lambda content: gzip.compress(nib.Nifti1Image(colours(), np.eye(4)).to_bytes()), "Cannot cast array data"),
    ],
    ids=["stream cut short", "volume cut short", "garbage", "empty", "colours"],
)
def test_unreadable_file_is_named_with_the_reason(readable, spoil, reason):
    bad = readable.with_name("bad.nii.gz")
    bad.write_bytes(spoil(readable.read_bytes()))
    with pytest.raises(ValueError, match="cannot be read as a volume of numbers") as caught:
        LoadVolumesd(["image", "label"])({"image": str(readable), "label": str(bad)})
    assert str(caught.value).startswith(f"{bad}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "scan"), MemoryError("Unable to allocate")])
def test_a_file_that_is_closed_to_us_or_too_large_is_not_called_damaged(readable, monkeypatch, error):
    def fails(file):
        raise error

    monkeypatch.setattr(nib, "load", fails)
    with pytest.raises(type(error)) as caught:
        LoadVolumesd("image")({"image": str(readable)})
    assert caught.value is error


def test_parts_of_another_version_are_refused():
    check_version(needed=custom.__version__)
    with pytest.raises(
        ValueError, match=r"custom: version .* was imported from .*custom, .* needs custom_version 99.0"
    ):
        check_version(needed="99.0")


# Confidence


def confidence_file(folder, values, affine=None):
    path = folder / "confidence.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(values, np.float32), np.eye(4) if affine is None else affine), path)
    return str(path)


def label_item(shape=(5, 6, 7), **more):
    return {"label": MetaTensor(torch.zeros(1, *shape), affine=torch.eye(4)), **more}


def test_confidence_is_read_on_the_grid_of_the_label(tmp_path):
    values = np.random.default_rng(0).random((5, 6, 7))
    item = LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, values)))
    np.testing.assert_allclose(item["confidence"][0], values, atol=1e-6)


def test_a_case_without_confidence_is_trusted_everywhere_on_the_grid_of_its_label():
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1])).double()
    item = LoadConfidenced()({"label": MetaTensor(torch.zeros(1, 5, 6, 7), affine=affine)})
    assert bool((item["confidence"] == 1).all())
    torch.testing.assert_close(item["confidence"].affine, affine)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_confidence_out_of_range_is_refused_with_its_file(tmp_path, value):
    values = np.full((5, 6, 7), 0.5)
    values[2, 3, 4] = value
    with pytest.raises(ValueError, match=r"confidence.nii.gz: confidence must lie between 0 and 1"):
        LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, values)))


@pytest.mark.parametrize(
    ("shape", "affine"), [((5, 6, 8), np.eye(4)), ((5, 6, 7), np.diag([1, 1, 2, 1.0]))], ids=["size", "affine"]
)
def test_confidence_on_another_grid_is_refused(tmp_path, shape, affine):
    with pytest.raises(ValueError, match=r"confidence.nii.gz: they must share one grid"):
        LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, np.ones(shape), affine)))


def test_confidence_of_several_channels_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"confidence.nii.gz: confidence must be one volume, got 2 channels"):
        LoadConfidenced()(label_item(confidence=confidence_file(tmp_path, np.ones((5, 6, 7, 2)))))


# The chain from files to volumes of the model


@pytest.fixture
def case(tmp_path):
    """Image, label (with an id to drop) and confidence at 2 mm in LPS."""
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    label = np.zeros((8, 9, 10), np.uint8)
    label[2:6, 2:6, 2:6], label[0, 0, 0] = 1, 11
    image = np.where(label == 1, 300, -500).astype(np.int16)
    trust = np.linspace(0, 1, label.size, dtype=np.float32).reshape(label.shape)
    for name, values in (("image", image), ("label", label), ("confidence", trust)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")
    return {name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "label", "confidence")}


def chain(**changes):
    options = {"pairs": [["image", "label"]], "num_labels": 2, "label_mapping": {"from": [11], "to": [0]}}
    return Compose(reading_chain(**{**options, "spacing_mm": [1.0, 1.0, 1.0], **changes}))


def test_volumes_come_in_ras_and_spacing_with_labels_renumbered_and_not_mixed(case):
    item = chain(confidence=True)(case)
    for key in ("image", "label", "confidence"):
        np.testing.assert_allclose(item[key].pixdim, 1.0)
        assert item[key].shape == item["label"].shape == (1, 15, 17, 19)
        assert (np.diag(item[key].affine)[:3] > 0).all()
    assert item["label"].unique().tolist() == [0, 1]
    assert len(item["image"].unique()) > 2  # linear
    assert len(item["confidence"].unique()) > 700


def test_what_is_not_resampled_stays_as_it_was_read(case):
    item = chain(resampled=["image"])(case)
    assert item["label"].shape == (1, 8, 9, 10)
    assert item["image"].shape == (1, 15, 17, 19)
    assert isinstance(item["confidence"], str), "not asked for"


def test_without_spacing_only_the_axes_are_turned(case):
    item = chain(spacing_mm=None)(case)
    assert item["image"].shape == (1, 8, 9, 10)
    np.testing.assert_allclose(item["image"].pixdim, 2.0)


def test_a_label_map_alone_and_no_renumbering(case):
    item = chain(pairs=[], labels=["label"], label_mapping={"from": [], "to": []}, num_labels=12)(case)
    assert item["label"].unique().tolist() == [0, 1, 11]


def test_an_image_alone_is_read_and_checked_as_one_of_a_pair(case):
    alone = chain(pairs=[], images=["image"])
    np.testing.assert_array_equal(alone({"image": case["image"]})["image"], chain()(case)["image"])
    with pytest.raises(RuntimeError) as caught:
        alone({"image": case["label"]})
    assert "values 0 to 11 are not Hounsfield units" in str(caught.value.__cause__)


def test_the_chain_checks_before_it_resamples(case):
    with pytest.raises(RuntimeError) as caught:
        chain(label_mapping={"from": [5], "to": [0]})(case)
    assert "label ids [11] are not in the label map 0 to 1" in str(caught.value.__cause__)


def test_limits_of_spacing_keep_volumes_as_fine_as_they_are_within_them(case):
    kept, finer = (chain(confidence=True, spacing_mm=limits)(case) for limits in ([1.0, 3.0], [0.5, 1.0]))
    assert kept["label"].shape == kept["image"].shape == kept["confidence"].shape == (1, 8, 9, 10)
    assert finer["label"].shape == finer["image"].shape == finer["confidence"].shape == (1, 15, 17, 19)
    linear = Spacingd("confidence", pixdim=[1.0] * 3, mode="bilinear")(kept)["confidence"]
    torch.testing.assert_close(finer["confidence"].as_tensor(), linear.as_tensor())


def test_the_chain_keeps_thin_labels_connected(tmp_path):
    label = np.zeros((30, 24, 24), np.uint8)
    for step in range(27):
        label[2 + step, 3 + step // 2, 5 + step // 2] = 1  # a line of one voxel
    nib.save(nib.Nifti1Image(label, np.diag([-0.5, 0.5, 0.5, 1])), tmp_path / "label.nii.gz")
    options = {"pairs": [], "labels": ["label"], "label_mapping": {"from": [], "to": []}}
    item = {"label": str(tmp_path / "label.nii.gz")}
    whole = chain(**options, spacing_mm=[1.2] * 3, thin_labels=[1])(item)["label"]
    assert betti_numbers(whole[0])[0] == 1
    assert betti_numbers(chain(**options, spacing_mm=[1.2] * 3)(item)["label"][0])[0] != 1
