"""Padding, reading between voxels, and the way back to the grid of a mask."""

import pytest
import torch
from custom.volumes.grids import InvertImaged, as_batch, pad_to_multiple, sample_cubic
from monai.data import MetaTensor
from monai.transforms import Compose, Spacingd


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


def test_images_come_back_to_a_finer_mask_by_linear_interpolation():
    """`Invertd` would follow the trace of the label, which is "nearest": a ramp would come back as a staircase."""
    label = MetaTensor(torch.zeros(1, 24, 12, 12), affine=torch.diag(torch.tensor([0.75, 0.75, 0.75, 1.0])))
    forward = Compose([Spacingd("label", pixdim=(1.5, 1.5, 1.5), mode="nearest")])
    item = forward({"label": label})
    ramp = torch.arange(12.0)[None, :, None, None].expand(1, 12, 6, 6) * 100
    back = InvertImaged("pred", transform=forward, orig_keys="label")({**item, "pred": MetaTensor(ramp.clone())})
    steps = back["pred"][0, 2:-2, 6, 6].diff()
    assert back["pred"].shape == label.shape
    torch.testing.assert_close(back["pred"].affine, label.affine)
    torch.testing.assert_close(steps.as_tensor(), torch.full_like(steps, 50).as_tensor(), atol=5, rtol=0)
    assert back["label"].shape == item["label"].shape
