"""Padding, reading between voxels, and the way back to the grid of a mask."""

import numpy as np
import pytest
import torch
from custom.volumes.grids import InvertImaged, as_batch, pad_to_multiple, resample_cubic, sample_cubic
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd
from monai.transforms.utils import convert_applied_interp_mode


def test_padding_repeats_the_far_edge_only():
    x = torch.randn(2, 1, 5, 8, 3)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (2, 1, 8, 8, 4)
    assert torch.equal(padded[..., :5, :, :3], x)
    assert torch.equal(padded[..., 5:, :, :3], x[..., 4:5, :, :].expand(-1, -1, 3, -1, -1))
    assert torch.equal(padded[..., :5, :, 3:], x[..., 2:3])


def test_padding_leaves_fitting_sizes_alone():
    x = torch.randn(1, 1, 4, 8, 12)
    assert pad_to_multiple(x, 4) is x


def test_plain_strips_metadata_and_adds_the_batch():
    result = as_batch(MetaTensor(torch.ones(1, 2, 3, 4, dtype=torch.int16)))
    assert type(result) is torch.Tensor
    assert result.shape == (1, 1, 2, 3, 4)
    assert result.dtype == torch.float32


def test_cubic_reading_returns_voxels_at_voxels_cubics_between_and_edges_outside():
    axis = torch.arange(20.0)
    cubic = (axis**3 / 50 - axis**2 / 3).view(1, 1, 20, 1, 1).expand(1, 1, 20, 5, 5)
    where = torch.zeros(1, 3, 4, 1, 1)
    where[:, 1:] = 2
    where[0, 0, :, 0, 0] = torch.tensor([7.0, 9.5, -30.0, 40.0])
    read = sample_cubic(cubic, where)
    assert read.shape == (1, 1, 4, 1, 1)
    expected = [7**3 / 50 - 7**2 / 3, 9.5**3 / 50 - 9.5**2 / 3, 0, 19**3 / 50 - 19**2 / 3]
    assert read.flatten().tolist() == pytest.approx(expected, abs=0.01)


OBLIQUE = np.array([[0.66, -0.21, 0, 5], [0.23, 0.62, 0.1, -40], [-0.03, -0.06, 0.8, 7], [0, 0, 0, 1.0]])
GANTRY = np.array([[0.7, 0, 0, 0], [0, 0.7, 0.3, 0], [0, 0, 0.9, 0], [0, 0, 0, 1.0]])
ROTATED = OBLIQUE.copy()
ROTATED[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * [0.7, 0.9, 0.8]
AFFINES = {
    "straight": np.diag([0.75, 0.75, 0.75, 1]),
    "flipped": np.diag([-0.7, -0.8, 1.1, 1]),
    "permuted": np.array([[0, 0, -0.7, 9], [0.8, 0, 0, 2], [0, 0.9, 0, 1], [0, 0, 0, 1.0]]),
    "oblique": ROTATED,
    "oblique, flipped and permuted": ROTATED[:, [2, 0, 1, 3]] * [-1, 1, 1, 1],
    "sheared": GANTRY,
}


def read(affine, shape=(25, 22, 19), spacing=1.2):
    """A label as read and then brought to the grid of a model, and the chain that did it."""
    affine = torch.as_tensor(affine, dtype=torch.float64)
    meta = {"original_affine": affine.numpy(), "spatial_shape": np.array(shape)}
    label = MetaTensor(torch.zeros(1, *shape), affine=affine, meta=meta)
    chain = Compose([Orientationd("label", axcodes="RAS", labels=None)])
    if spacing is not None:
        chain = Compose([*chain.transforms, Spacingd("label", pixdim=[spacing] * 3, mode="nearest")])
    return chain({"label": label}), chain


def smooth(affine, shape):
    """HU of a smooth function of the place in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(index @ np.asarray(affine)[:3, :3].T + np.asarray(affine)[:3, 3], -1, 0)
    return torch.from_numpy(300 * np.sin(x / 4) + 200 * np.cos(y / 5) + 100 * np.sin(z / 3 + x / 6)).float()[None]


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_images_come_back_where_monai_brings_them_and_closer_to_the_truth(affine):
    item, chain = read(affine)
    image = smooth(item["label"].affine, item["label"].shape[1:])
    item["pred"] = MetaTensor(image.clone())
    back = InvertImaged("pred", orig_keys="label")(item)
    linear = dict(item, label=MetaTensor(item["label"], meta=item["label"].meta))
    linear["label"].applied_operations = convert_applied_interp_mode(
        item["label"].applied_operations, mode="bilinear", align_corners=False
    )
    theirs = Invertd("pred", chain, "label", nearest_interp=False)(linear)["pred"]
    assert back["pred"].shape == theirs.shape == (1, 25, 22, 19)
    torch.testing.assert_close(back["pred"].affine, theirs.affine)
    torch.testing.assert_close(back["pred"].affine, torch.as_tensor(affine, dtype=torch.float64))
    inner, truth = (0, *[slice(4, -4)] * 3), smooth(affine, (25, 22, 19))
    ours_off, theirs_off = ((x.as_tensor() - truth)[inner].abs() for x in (back["pred"], theirs))
    assert theirs_off.max() < 40, "the same place"
    assert ours_off.max() < 8
    assert ours_off.mean() < theirs_off.mean() / 4
    assert back["label"] is item["label"]


def test_values_stay_within_those_of_the_image():
    """Splines overshoot beside a step: a confidence above 1 would be refused when it is read."""
    item, _ = read(AFFINES["flipped"])
    step = torch.zeros(item["label"].shape)
    step[:, 6:] = 1
    back = InvertImaged(["confidence"], orig_keys="label")({**item, "confidence": step})["confidence"]
    assert (float(back.min()), float(back.max())) == (0, 1)


def test_images_on_the_grid_of_the_file_come_back_as_they_are():
    item, _ = read(AFFINES["straight"], spacing=0.75)
    image = torch.randn(item["label"].shape)
    back = InvertImaged("pred", orig_keys="label")({**item, "pred": MetaTensor(image.clone())})
    assert torch.equal(back["pred"].as_tensor(), image)


def test_turned_axes_alone_change_no_value():
    item, _ = read(AFFINES["permuted"], spacing=None)
    image = torch.randn(item["label"].shape)
    back = InvertImaged("pred", orig_keys="label")({**item, "pred": MetaTensor(image.clone())})
    again = Orientationd("pred", axcodes="RAS", labels=None)(back)["pred"]
    torch.testing.assert_close(again.as_tensor(), image, atol=1e-5, rtol=0)


def test_a_single_slice_is_repeated():
    back = resample_cubic(torch.arange(12.0).view(3, 4, 1), np.eye(4), np.diag([1, 1, 0.5, 1]), (3, 4, 2))
    assert torch.allclose(back, torch.arange(12.0).view(3, 4, 1).expand(3, 4, 2), atol=1e-5)


def test_a_label_that_does_not_tell_its_grid_is_refused():
    item, _ = read(AFFINES["straight"])
    del item["label"].meta["spatial_shape"]
    with pytest.raises(ValueError, match="label: its meta must hold original_affine and spatial_shape"):
        InvertImaged("pred", orig_keys="label")({**item, "pred": torch.zeros(item["label"].shape)})
