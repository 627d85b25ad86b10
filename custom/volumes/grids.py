"""Windows, padding and resampling of volumes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Invertd, InvertibleTransform
from monai.transforms.utils import convert_applied_interp_mode
from scipy import ndimage
from torch.nn import functional as F


def crop(x: torch.Tensor, window: Sequence[slice]) -> torch.Tensor:
    """View of (..., H, W, D) in a window of three slices."""
    return x[..., window[0], window[1], window[2]]


def crop_to(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """View of the first voxels of (..., H, W, D) along each axis: takes padding at the far end away."""
    return crop(x, [slice(n) for n in size])


def pad_to(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Pad the far end of each spatial axis of (B, C, H, W, D) by its edge value up to a size, at least its own."""
    missing = [n - m for n, m in zip(size, x.shape[2:], strict=True)]
    return F.pad(x, [p for m in reversed(missing) for p in (0, m)], mode="replicate") if any(missing) else x


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad the far end of each spatial axis of (B, C, H, W, D) by its edge value up to a multiple of `multiple`."""
    return pad_to(x, [n + -n % multiple for n in x.shape[2:]])


def spacing_of(volume: MetaTensor) -> list[float]:
    """Voxel size of (C, H, W, D) along each axis, mm."""
    return [float(edge) for edge in volume.pixdim]


def as_batch(volume: torch.Tensor) -> torch.Tensor:
    """(1, H, W, D), MetaTensor or not -> plain float (1, 1, H, W, D)."""
    return torch.as_tensor(volume).as_subclass(torch.Tensor).float()[None]


def on_grid_of(volume: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(1, 1, H, W, D) -> (1, H, W, D) on the grid of a reference."""
    return MetaTensor(volume[0], meta=reference.meta) if isinstance(reference, MetaTensor) else volume[0]


def sample_cubic(volume: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Image (1, 1, h, w, d) read at (1, 3, H, W, D) voxels of it by cubic splines, edge values outside."""
    values = ndimage.map_coordinates(volume[0, 0].numpy(), where[0].numpy(), order=3, mode="nearest")
    return torch.from_numpy(values)[None, None]


def on_device(batch: Mapping[str, Any], key: str, device: Any, non_blocking: bool = False) -> torch.Tensor:
    """Volumes of a batch as plain float32 on a device."""
    return batch[key].as_subclass(torch.Tensor).to(device=device, dtype=torch.float32, non_blocking=non_blocking)


class InvertImaged(Invertd):
    """MONAI's `Invertd` for images that are brought back along the transforms of a label, whose trace says "nearest".

    `nearest_interp=False` leaves the mode of the trace as it is; here resampling is linear.

    Args:
        keys, transform, orig_keys: as there; all keys follow one label.
    """

    def __init__(self, keys: KeysCollection, transform: InvertibleTransform, orig_keys: str) -> None:
        super().__init__(keys, transform, orig_keys, nearest_interp=False)
        self.label_key = orig_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Invert the images of one item."""
        label = data[self.label_key]
        linear = MetaTensor(label, meta=label.meta, applied_operations=label.applied_operations)
        linear.applied_operations = convert_applied_interp_mode(
            label.applied_operations, mode="bilinear", align_corners=False
        )
        return {**super().__call__({**data, self.label_key: linear}), self.label_key: label}
