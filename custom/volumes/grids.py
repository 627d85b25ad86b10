"""Windows, padding and resampling of volumes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from custom.volumes.headers import TOLERANCE_VOXELS
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.interpolate import CubicSpline
from torch.nn import functional as F

_NO_WEIGHT = 1e-9  # of a voxel in a spline: below single precision, and farther off numbers that processors are slow at
_SAME_VOXELS = 1e-3  # ours: grids that are less apart are one; single precision puts the far corner this far off


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


def _cubic_weights(where: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Weights (N, size) that read the natural cubic spline through `size` values at N places; edge values outside."""
    if size == 1:
        return np.ones((len(where), 1))
    weights = CubicSpline(np.arange(size), np.eye(size), bc_type="natural")(where.clip(0, size - 1))
    return np.where(np.abs(weights) < _NO_WEIGHT, 0.0, weights)


def _linear_weights(where: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Weights (N, size) that read `size` values linearly at N places; edge values outside."""
    where = where.clip(0, size - 1)
    return (1 - np.abs(where[:, None] - np.arange(size))).clip(0)


def _axes_between(to_source: NDArray[np.float64], new_shape: Sequence[int]) -> list[int] | None:
    """Axis of a grid that runs along each axis of a new one; None of grids that are sheared against each other."""
    turn = to_source[:3, :3]
    axes = [int(axis) for axis in np.abs(turn).argmax(0)]
    along = np.zeros((3, 3), dtype=bool)
    along[axes, range(3)] = True
    sheared = (np.abs(turn * ~along) @ new_shape).max() > TOLERANCE_VOXELS
    return None if sheared or sorted(axes) != [0, 1, 2] else axes


def resample_cubic(
    volume: torch.Tensor, affine: ArrayLike, new_affine: ArrayLike, new_shape: Sequence[int]
) -> torch.Tensor:
    """Image (h, w, d) read on another grid by cubic splines, edge values outside, within its own minimum and maximum.

    Grids whose axes are parallel, in whatever order and direction, are read axis by axis, by matrices; sheared ones,
    which only a gantry tilt makes, voxel by voxel, which takes ten times as long.

    Args:
        volume: (h, w, d) float32.
        affine, new_affine: 4 x 4 each, of its grid and of the new one.
        new_shape: (H, W, D) of the new grid.

    Returns:
        (H, W, D) float32 on the same device; the volume itself where the two grids are one.
    """
    shape, new_shape = tuple(volume.shape), tuple(int(n) for n in new_shape)
    to_source = np.linalg.solve(np.asarray(affine, dtype=float), np.asarray(new_affine, dtype=float))
    if shape == new_shape and np.abs(to_source - np.eye(4))[:3].max() * max(shape) < _SAME_VOXELS:
        return volume
    axes = _axes_between(to_source, new_shape)
    if axes is None:
        moved = ndimage.affine_transform(
            volume.cpu().numpy(),
            to_source[:3, :3],
            to_source[:3, 3],
            output_shape=new_shape,
            output=np.float32,
            order=3,
            mode="nearest",
        )
        new = torch.from_numpy(moved).to(volume.device)
    else:
        window = [slice(n) for n in new_shape]
        new = _along_axes(volume[None], to_source, axes, window, _cubic_weights)[0]
    return new.clamp_(volume.min(), volume.max())


def read_linear(volume: torch.Tensor, to_source: NDArray[np.float64], window: Sequence[slice]) -> torch.Tensor:
    """Channels (C, h, w, d) read linearly in a window of another grid, edge values outside.

    Args:
        volume: float32.
        to_source: 4 x 4, voxels of the other grid to voxels of the volume.
        window: three slices of whole numbers.

    Returns:
        (C, H, W, D) of the window.
    """
    axes = _axes_between(to_source, [s.stop for s in window])
    if axes is not None:
        return _along_axes(volume, to_source, axes, window, _linear_weights)
    unit = 2 / np.maximum(np.array(volume.shape[1:]) - 1, 1)
    places = torch.meshgrid(*(torch.arange(s.start or 0, s.stop).double() for s in window), indexing="ij")
    turn, start = torch.from_numpy(to_source[:3, :3].T * unit), torch.from_numpy(to_source[:3, 3] * unit - 1)
    where = (torch.stack(places, -1) @ turn + start).flip(-1)[None].to(volume)
    return F.grid_sample(volume[None], where, padding_mode="border", align_corners=True)[0]


def _along_axes(
    volume: torch.Tensor,
    to_source: NDArray[np.float64],
    axes: Sequence[int],
    window: Sequence[slice],
    weigh: Callable[[NDArray[np.float64], int], NDArray[np.float64]],
) -> torch.Tensor:
    """Channels (C, h, w, d) read in a window of a grid whose axes run along those of the volume, one by one."""
    matrices, used = [], [slice(None)] * 3
    for number, (axis, span) in enumerate(zip(axes, window, strict=True)):
        where = to_source[axis, 3] + to_source[axis, number] * np.arange(span.start or 0, span.stop)
        weights = weigh(where, volume.shape[1 + axis])
        columns = np.flatnonzero(weights.any(0))
        used[axis] = slice(int(columns[0]), int(columns[-1]) + 1)
        matrices.append(torch.from_numpy(weights[:, used[axis]]).to(volume))
    x, y, z = matrices
    new = crop(volume, used).permute(0, *(1 + axis for axis in axes)) @ z.T  # the axis of the smallest steps first
    new = y @ new
    return (x @ new.flatten(2)).unflatten(2, new.shape[2:])


def file_grid(volume: MetaTensor, key: str) -> tuple[NDArray[np.float64], list[int]]:
    """Affine and shape of the file that a volume was read from, whatever became of it since.

    Args:
        volume: with its meta.
        key: its name in the error.

    Raises:
        ValueError: when the meta does not tell.
    """
    if not {"original_affine", "spatial_shape"} <= set(volume.meta):
        raise ValueError(
            f"{key}: its meta must hold original_affine and spatial_shape of the file, got {sorted(volume.meta)}; read "
            "it by LoadVolumesd"
        )
    return np.asarray(volume.meta["original_affine"], dtype=float), np.asarray(volume.meta["spatial_shape"]).tolist()


class InvertImaged(MapTransform):
    """Bring rendered images back to the grid on which their label map was read, by cubic splines.

    In place of MONAI's `Invertd`, whose linear interpolation costs thin vessels their contrast and which would follow
    the trace of the label, "nearest". Both grids are known by their affines, so the trace is not needed. Values stay
    between the minimum and the maximum of the image; beyond the outermost voxel centres lie edge values.

    Args:
        keys: images on the grid of the label.
        orig_keys: the label, which stays as it is.

    Raises:
        ValueError: when the label does not tell the grid of its file.
    """

    def __init__(self, keys: KeysCollection, orig_keys: str) -> None:
        super().__init__(keys)
        self.label_key = orig_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring back the images (1, H, W, D) of one item."""
        item = dict(data)
        label = item[self.label_key]
        affine, shape = file_grid(label, self.label_key)
        for key in self.key_iterator(item):
            image = torch.as_tensor(item[key]).as_subclass(torch.Tensor).detach().float()
            back = torch.stack([resample_cubic(channel, label.affine, affine, shape) for channel in image])
            item[key] = MetaTensor(back, meta={**label.meta, "affine": torch.from_numpy(affine)})
        return item
