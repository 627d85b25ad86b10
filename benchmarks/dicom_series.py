"""DICOM series of a volume whose every value is known, as scanners write them and as archives spoil them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

_TO_LPS = np.diag([-1.0, -1.0, 1.0])
WRITER = Path(__file__).with_name("dicom_writer.py")


@dataclass(frozen=True)
class Volume:
    """A volume that can be looked up anywhere.

    Attributes:
        hu: (H, W, D).
        affine: voxels to mm, RAS.
    """

    hu: np.ndarray
    affine: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Middle of the volume, mm, RAS."""
        return self.affine[:3, :3] @ ((np.array(self.hu.shape) - 1) / 2) + self.affine[:3, 3]

    @staticmethod
    def load(path: Path, *, sigma_voxels: float = 1.5) -> Volume:
        """Of a NIfTI file, smoothed, so that interpolation elsewhere differs by a few HU only."""
        image = nib.load(path)
        return Volume(ndimage.gaussian_filter(np.asarray(image.dataobj, np.float32), sigma_voxels), image.affine)

    def at(self, places: np.ndarray) -> np.ndarray:
        """HU at places (..., 3) in mm, RAS, by linear interpolation; NaN outside."""
        inverse = np.linalg.inv(self.affine)
        voxels = places @ inverse[:3, :3].T + inverse[:3, 3]
        return ndimage.map_coordinates(self.hu, np.moveaxis(voxels, -1, 0), order=1, cval=np.nan)

    def on(self, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
        """HU on a grid (H, W, D)."""
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        return self.at(grid @ affine[:3, :3].T + affine[:3, 3])


@dataclass(frozen=True)
class Series:
    """How a series is taken and written.

    Attributes:
        size: columns and rows, slices.
        pixel_mm: between pixels.
        slice_mm: from slice to slice, along the table.
        tilt_degrees: of the gantry about the left-right axis; slices then lie obliquely to the table.
        turn_degrees: of the image plane about the table's axis.
        feet_first: columns and slices run the other way.
        slopes: rescale slope of each slice, repeated.
        intercept: rescale intercept.
        missing: slices that were lost.
        shifted: slice -> mm by which it lies too far.
        compressed: run-length encoded.
        description: of the series.
    """

    size: tuple[int, int] = (40, 36)
    pixel_mm: float = 2.0
    slice_mm: float = 2.5
    tilt_degrees: float = 0.0
    turn_degrees: float = 0.0
    feet_first: bool = False
    slopes: tuple[float, ...] = (1.0,)
    intercept: float = -1024.0
    missing: tuple[int, ...] = ()
    shifted: dict[int, float] = field(default_factory=dict)
    compressed: bool = False
    description: str = "CTA"

    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps along a row, along a column and from slice to slice, mm, LPS."""
        turn, tilt = np.deg2rad([self.turn_degrees, self.tilt_degrees])
        way = -1.0 if self.feet_first else 1.0
        row = way * np.array([np.cos(turn), np.sin(turn), 0])
        column = np.array([-np.sin(turn) * np.cos(tilt), np.cos(turn) * np.cos(tilt), np.sin(tilt)])
        return row * self.pixel_mm, column * self.pixel_mm, np.array([0, 0, way * self.slice_mm])

    def affine(self, centre: np.ndarray) -> np.ndarray:
        """Columns, rows and slices to mm, RAS, about a centre."""
        steps = _TO_LPS @ np.stack(self.axes(), 1)
        middle = (np.array([self.size[0], self.size[0], self.size[1]]) - 1) / 2
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = steps, centre - steps @ middle
        return affine


def write_series(
    volume: Volume, series: Series, folder: Path, *, python: str, uid: str | None = None, add_hu: float = 0
) -> None:
    """Write a file a slice, named in no order; stored values are whole, so HU are within half a slope.

    Args:
        volume: what is scanned; the middle of the series lies in its middle.
        series: how.
        folder: made; other series may lie there.
        python: program of an environment with pydicom, which this one need not have.
        uid: to write two volumes as one series.
        add_hu: to every voxel, to tell phases apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    affine = series.affine(volume.centre)
    columns, rows = np.meshgrid(np.arange(series.size[0]), np.arange(series.size[0]))
    heights = [k + series.shifted.get(k, 0.0) / series.slice_mm for k in range(series.size[1])]
    grid = np.stack([np.stack([columns, rows, np.full(rows.shape, height)], -1) for height in heights])
    hu = np.nan_to_num(volume.at(grid @ affine[:3, :3].T + affine[:3, 3]), nan=-1000.0) + add_hu
    slices = folder / "slices.npy"
    np.save(slices, hu)
    row, column, step = (axis.tolist() for axis in series.axes())
    spec = {**asdict(series), "row": row, "column": column, "step": step, "uid": uid, "add_hu": add_hu}
    spec["first"] = (_TO_LPS @ affine[:3, 3]).tolist()
    given = [python, str(WRITER), str(slices), json.dumps(spec)]
    subprocess.run(given, check=True, env={**os.environ, "PYTHONPATH": ""})
    slices.unlink()
