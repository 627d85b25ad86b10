"""Class scores made a label map on the grid of their file, in memory that real scans leave."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from custom.geometry.topology import bounding_box, grown_box, largest_components
from custom.volumes.grids import crop, file_grid, read_linear
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray
from scipy import ndimage

_VALUES = 1 << 26  # ours: 256 MB of scores at a time


class LabelsOnFileGridd(MapTransform):
    """Read class scores linearly on the grid of the file that an image was read from; the highest wins there.

    What MONAI's `Invertd` and `AsDiscreted` do together, but for a slab of voxels at a time, and only where another
    class than the background may win. Of 512 x 512 x 275 voxels and eleven classes the scores alone take 3 GB, and
    `Invertd` holds three of them. Both grids are known by their affines, so the trace is not needed.

    Args:
        keys: scores (K, h, w, d) on the grid of the image, background first.
        orig_keys: the image, which stays as it is.

    Raises:
        ValueError: when the image does not tell the grid of its file.
    """

    def __init__(self, keys: KeysCollection, orig_keys: str) -> None:
        super().__init__(keys)
        self.image_key = orig_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make the label maps (1, H, W, D) uint8 of one item."""
        item = dict(data)
        image = item[self.image_key]
        affine, shape = file_grid(image, self.image_key)
        to_image = np.linalg.solve(np.asarray(image.affine, dtype=float), affine)
        for key in self.key_iterator(item):
            scores = torch.as_tensor(item[key]).as_subclass(torch.Tensor).detach().float()
            labels = torch.zeros(1, *shape, dtype=torch.uint8)
            _label(scores, to_image, labels[0])
            item[key] = MetaTensor(labels, meta={**image.meta, "affine": torch.from_numpy(affine)})
        return item


def _label(scores: torch.Tensor, to_image: NDArray[np.float64], labels: torch.Tensor) -> None:
    """Write the winners of scores (K, h, w, d) into `labels` (H, W, D), zero before."""
    found = (scores.argmax(0) > 0).cpu().numpy()
    if not found.any():
        return
    # Between voxels that the background wins it wins, too.
    box = grown_box(bounding_box(found), [1, 1, 1])
    corners = np.stack(np.meshgrid(*((s.start - 1, s.stop) for s in box)), -1).reshape(-1, 3) - to_image[:3, 3]
    ends = np.linalg.solve(to_image[:3, :3], corners.T)
    low, high = np.floor(ends.min(1)).astype(int).clip(0), np.ceil(ends.max(1)).astype(int) + 1
    window = [slice(int(a), min(int(b), n)) for a, b, n in zip(low, high, labels.shape, strict=True)]
    to_box = to_image.copy()
    to_box[:3, 3] -= [s.start for s in box]
    rows = max(_VALUES // (len(scores) * math.prod(s.stop - s.start for s in window[1:])), 1)
    for row in range(window[0].start, window[0].stop, rows):
        slab = [slice(row, min(row + rows, window[0].stop)), *window[1:]]
        read = read_linear(crop(scores, box), to_box, slab)
        crop(labels, slab).copy_(read.max(0).indices)  # `argmax` is the same in five times as long


class KeepPiecesd(MapTransform):
    """Keep the largest pieces of labels, of voxels that share a corner, each in the box that holds it: what is lost is
    background. As MONAI's `KeepLargestConnectedComponent`, in a fifth of the time.

    Args:
        keys: label maps (1, H, W, D).
        pieces: label id -> how many pieces; other labels stay whole.
    """

    def __init__(self, keys: KeysCollection, pieces: Mapping[int, int]) -> None:
        super().__init__(keys)
        self.pieces = dict(pieces)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Keep them in one item."""
        item = dict(data)
        for key in self.key_iterator(item):
            labels = item[key].clone()
            volume = torch.as_tensor(labels).as_subclass(torch.Tensor)[0].cpu().numpy()
            volume = volume.astype(np.min_scalar_type(int(volume.max())))
            boxes = ndimage.find_objects(volume)
            for k, number in self.pieces.items():
                if k <= len(boxes) and boxes[k - 1] is not None:
                    part = volume[boxes[k - 1]]
                    mask = part == k
                    part[mask & ~largest_components(mask, number)] = 0
            labels[0] = torch.from_numpy(volume)
            item[key] = labels
        return item
