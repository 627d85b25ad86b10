"""Confidence handed to the loss."""

from __future__ import annotations

import torch
from custom.segmentation.transforms import PrepareConfidence


def test_a_batch_becomes_image_and_targets():
    volumes = {key: torch.rand(2, 1, 3, 3, 3) for key in ("image", "label", "confidence")}
    image, targets, *_ = PrepareConfidence()({**volumes, "sample_weight": torch.tensor([1.0, 2.0])}, "cpu")
    torch.testing.assert_close(image, volumes["image"])
    assert set(targets) == {"label", "confidence", "sample_weight"}
    assert targets["sample_weight"].tolist() == [1.0, 2.0]
