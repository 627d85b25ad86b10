"""Label maps from class scores: as MONAI makes them from whole volumes, in memory for a slab."""

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.volumes import KeepPiecesd, LabelsOnFileGridd, segmentations
from monai.data import MetaTensor
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    KeepLargestConnectedComponentd,
    LoadImaged,
    Orientationd,
    Spacingd,
)
from scipy import ndimage

TURN = np.deg2rad(20)
FRAMES = {
    "ras": np.diag([1.0, 0.8, 2.0, 1.0]),
    "lps": np.array([[-1.0, 0, 0, 40], [0, -0.8, 0, 30], [0, 0, 2, 0], [0, 0, 0, 1]]),
    "axes swapped": np.array([[0, 0, 2.0, 3], [1, 0, 0, -5], [0, -0.8, 0, 8], [0, 0, 0, 1]]),
    "oblique": np.array(
        [
            [np.cos(TURN), -0.8 * np.sin(TURN), 0, 0],
            [np.sin(TURN), 0.8 * np.cos(TURN), 0, 0],
            [0, 0, 2, 0],
            [0, 0, 0, 1],
        ]
    ),
    "sheared": np.array([[1.0, 0, 0, 0], [0, 0.8, 0.5, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),
}


def blobs(shape, classes, background=0.0):
    """Scores (K, *shape) of smooth blobs."""
    noise = np.random.default_rng(0).normal(size=(classes, *shape))
    scores = torch.from_numpy(np.stack([ndimage.gaussian_filter(n, 2) for n in noise])).float()
    scores[0] += background
    return (20 * scores).softmax(0)


@pytest.fixture
def read(tmp_path):
    """Function(frame) -> the preprocessing of the bundle in short, and what it makes of an image in that frame."""

    def load(frame):
        nib.save(nib.Nifti1Image(np.zeros((30, 41, 13), np.float32), FRAMES[frame]), tmp_path / "image.nii.gz")
        chain = Compose(
            [
                LoadImaged("image"),
                EnsureChannelFirstd("image"),
                Orientationd("image", axcodes="RAS", labels=None),
                Spacingd("image", pixdim=[1.5] * 3, padding_mode="border"),
            ]
        )
        return chain, chain({"image": str(tmp_path / "image.nii.gz")})

    return load


@pytest.mark.parametrize("background", [0.0, 0.04], ids=["everywhere", "few"])
@pytest.mark.parametrize("frame", FRAMES)
def test_the_winners_are_those_of_invertd_and_argmax(read, monkeypatch, frame, background):
    monkeypatch.setattr(segmentations, "_VALUES", 20000)  # several slabs
    chain, item = read(frame)
    item["pred"] = MetaTensor(blobs(item["image"].shape[1:], 4, background), meta=item["image"].meta)
    inverse = Compose(
        [
            Invertd("pred", chain, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
        ]
    )
    expected = inverse(dict(item))["pred"]
    found = LabelsOnFileGridd("pred", "image")(item)["pred"]
    assert found.shape == expected.shape == (1, 30, 41, 13)
    assert found.dtype == torch.uint8
    np.testing.assert_allclose(found.affine, FRAMES[frame], atol=1e-6)
    assert expected.unique().numel() == 4
    assert (found != expected).float().mean() < 1e-3  # ties, and rounding of coordinates


def test_nothing_found_is_an_empty_label_map(read):
    _, item = read("lps")
    scores = torch.zeros(3, *item["image"].shape[1:])
    scores[0] = 1
    found = LabelsOnFileGridd("pred", "image")({**item, "pred": scores})["pred"]
    assert found.shape == (1, 30, 41, 13)
    assert not found.any()


def test_an_image_that_does_not_tell_its_file_is_refused():
    image = MetaTensor(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="image: its meta must hold original_affine and spatial_shape"):
        LabelsOnFileGridd("pred", "image")({"image": image, "pred": torch.zeros(2, 4, 4, 4)})


def test_pieces_are_kept_as_monai_keeps_them():
    scores = blobs((30, 28, 26), 4, 0.02)
    labels = MetaTensor(scores.argmax(0, keepdim=True).to(torch.uint8))
    before = labels.clone()
    kept = KeepPiecesd("pred", {1: 1, 2: 2, 7: 1})({"pred": labels})["pred"]
    options = {"is_onehot": False, "keys": "pred"}
    expected = Compose(
        [
            KeepLargestConnectedComponentd(applied_labels=[1], **options),
            KeepLargestConnectedComponentd(applied_labels=[2], num_components=2, **options),
        ]
    )({"pred": labels.clone()})["pred"]
    assert torch.equal(kept, expected)
    assert (kept != before).any()
    assert torch.equal(labels, before), "the input stays as it is"
    assert torch.equal(kept == 3, before == 3)
