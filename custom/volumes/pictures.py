"""Contact sheets of volumes, as a radiologist would page through them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from custom.geometry.topology import bounding_box, grown_box
from custom.runs.files import replace_file
from custom.volumes.colours import label_colour
from custom.volumes.reading import LoadVolumesd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Orientation
from scipy import ndimage

WINDOW_HU = (-250.0, 650.0)  # ours: fat (-100 HU) and blood with contrast (500 HU) stand apart from black and white
_AROUND_VESSELS = 3  # voxels, ours: what a front view of vessels shows beside them


def read_one(path: str | os.PathLike) -> MetaTensor:
    """Volume of a file, (1, H, W, D) float32.

    Raises:
        FileNotFoundError, ValueError: naming a file that is not one volume.
    """
    volume = Compose([LoadVolumesd("volume"), EnsureChannelFirstd("volume")])({"volume": str(path)})["volume"]
    if volume.ndim != 4 or len(volume) != 1:
        raise ValueError(f"{path}: must be one 3D volume of one channel, got channels and size {tuple(volume.shape)}")
    return volume


def turned(volume: MetaTensor) -> MetaTensor:
    """A volume (1, H, W, D) turned to RAS, as pictures need it."""
    upright: MetaTensor = Orientation(axcodes="RAS", labels=None)(volume)  # type: ignore[assignment]
    return upright


def read_ras(path: str | os.PathLike) -> np.ndarray:
    """Volume of a file, (H, W, D) float32, turned to RAS; errors as :func:`read_one`."""
    return turned(read_one(path))[0].numpy()


def planes(volume: np.ndarray, centre: Sequence[int]) -> list[np.ndarray]:
    """Axial, coronal and sagittal slice of an RAS volume through a voxel, in radiological convention.

    The patient's right is on the left of axial and coronal slices, the front on the left of sagittal ones.
    """
    x, y, z = centre
    return [np.flip(np.rot90(plane), 1) for plane in (volume[:, :, z], volume[:, y, :], volume[x])]


def heart_centre(label: np.ndarray) -> tuple[int, int, int]:
    """Voxel at the centre of mass of all labels; the centre of the volume when there is none."""
    flat = (label > 0).sum(2)
    along = flat.sum(1), flat.sum(0), (label > 0).sum((0, 1))
    if not flat.any():
        return tuple(n // 2 for n in label.shape)  # type: ignore[return-value]
    # `ndimage.center_of_mass` makes three arrays of float64 of the volume for this.
    return tuple(round(float(np.arange(len(n)) @ n / n.sum())) for n in along)  # type: ignore[return-value]


def vessel_projection(image: np.ndarray, label: np.ndarray, vessel_labels: Sequence[int]) -> np.ndarray:
    """Coronal maximum intensity projection (mm of depth all alike) of what lies within 3 voxels of the vessels."""
    vessel, front = np.isin(label, vessel_labels), np.full(label.shape[::2], WINDOW_HU[0], dtype=np.float32)
    if vessel.any():
        h, w, d = grown_box(bounding_box(vessel), [_AROUND_VESSELS] * 3)
        near = ndimage.binary_dilation(vessel[h, w, d], iterations=_AROUND_VESSELS)
        near &= np.isin(label[h, w, d], [0, *vessel_labels])
        front[h, d] = np.where(near, image[h, w, d], WINDOW_HU[0]).max(1).clip(WINDOW_HU[0])
    return np.flip(np.rot90(front), 1)


def vessel_depth(label: np.ndarray, vessel_labels: Sequence[int]) -> np.ndarray:
    """Front view (D, H, 3) of vessels before the silhouette of all labels, brighter where they lie nearer."""
    body, vessel = label > 0, np.isin(label, vessel_labels)
    depth = np.linspace(1.0, 0.35, label.shape[1])[vessel[:, ::-1].argmax(1)]  # of the nearest, the last along the axis
    front = np.flip(np.rot90(np.where(vessel.any(1), depth, 0)), 1)
    silhouette = np.flip(np.rot90(body.mean(1)), 1)
    grey = 0.5 * silhouette / max(float(silhouette.max()), 1e-6)
    return np.clip(grey[..., None] * np.array([0.6, 0.6, 0.7]) + front[..., None] * np.array([1.0, 0.35, 0.25]), 0, 1)


def save_mask_sheet(
    path: str | os.PathLike, rows: Sequence[tuple[str, np.ndarray]], *, vessel_labels: Sequence[int]
) -> None:
    """Write a PNG with one row a label map: axial, coronal and sagittal plane, and its vessels from the front.

    Args:
        path: PNG, replaced atomically; its folder is made.
        rows: (title, label), each volume (H, W, D) in RAS.
        vessel_labels: ids of the projection.
    """
    figure = Figure(figsize=(11, 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    colours = np.array([to_rgb(label_colour(i)) for i in range(256)])
    for row, (title, label) in zip(axes, rows, strict=True):
        panels = [colours[plane.astype(int)] for plane in planes(label, heart_centre(label))]
        for axis, panel in zip(row, [*panels, vessel_depth(label, vessel_labels)], strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
        row[0].set_title(title, fontsize=9, loc="left", parse_math=False)
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    replace_file(Path(path), lambda part: figure.savefig(part, dpi=80))


def save_sheet(
    path: str | os.PathLike, rows: Sequence[tuple[str, np.ndarray, np.ndarray]], *, vessel_labels: Sequence[int]
) -> None:
    """Write a PNG with one row a volume: three planes, the axial one with the mask outlined, and a vessel projection.

    Args:
        path: PNG, replaced atomically; its folder is made.
        rows: (title, image in HU, label), each volume (H, W, D) in RAS.
        vessel_labels: ids of the projection.
    """
    figure = Figure(figsize=(15, 3.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 5, squeeze=False)
    for row, (title, image, label) in zip(axes, rows, strict=True):
        centre = heart_centre(label)
        slices, masks = planes(image, centre), planes(label, centre)
        panels = [*slices, slices[0], vessel_projection(image, label, vessel_labels)]
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], interpolation="nearest")
            axis.set_axis_off()
        for index in np.unique(masks[0])[1:]:
            row[3].contour(masks[0] == index, [0.5], colors=[label_colour(int(index))], linewidths=0.8)
        row[0].set_title(title, fontsize=9, loc="left", parse_math=False)
    _save(figure, path)
