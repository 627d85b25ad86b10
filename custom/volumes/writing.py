"""Volumes written as NIfTI files that are either absent or whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import Orientation, Transform
from nibabel.orientations import aff2axcodes

from custom.runs.files import replace_file


def write_volume(path: Path, volume: MetaTensor, *, dtype: str, digits: int = 0) -> None:
    """Write a volume with its own affine. Not by `SaveImage`: it turns a full disk into advice to install writers.

    Args:
        path: NIfTI file, replaced atomically; its folder is made.
        volume: (1, H, W, D); it is rounded to `digits` after the point.
        dtype: of the file, "int16" for HU, "uint8" for label maps.
        digits: 0 for whole numbers.

    Raises:
        OSError: naming the file, when the disk is full or the folder cannot be written; no partial file stays.
    """
    writer = NibabelWriter(output_dtype=dtype)
    # Not `set_data_array`, which would drop a last axis of one voxel; bytes cannot be rounded.
    writer.data_obj = torch.round(volume[0].float(), decimals=digits)
    writer.set_metadata(volume.meta, resample=False)
    replace_file(path, writer.write)


class SaveVolumed(Transform):
    """Write a volume as `<output_dir>/<case>.nii.gz` with its own affine.

    Args:
        key: the volume, (1, H, W, D); it is rounded to `digits` after the point.
        output_dir: made when absent.
        dtype: of the file, "int16" for HU, "uint8" for label maps.
        digits: 0 for whole numbers.
        original_axes: turn the axes back to the order and direction of the file that the volume was read from.
    """

    def __init__(
        self, key: str, *, output_dir: str, dtype: str = "int16", digits: int = 0, original_axes: bool = False
    ) -> None:
        self.key, self.output_dir, self.dtype, self.digits = key, output_dir, dtype, digits
        self.original_axes = original_axes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one case.

        Raises:
            OSError: see :func:`write_volume`.
        """
        volume = data[self.key]
        if self.original_axes:
            codes = "".join(aff2axcodes(np.asarray(volume.meta["original_affine"])))
            volume = Orientation(axcodes=codes, labels=None)(volume)
        path = Path(self.output_dir, f"{data['case']}.nii.gz")
        write_volume(path, volume, dtype=self.dtype, digits=self.digits)
        return dict(data)
