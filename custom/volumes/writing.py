"""Volumes written as NIfTI files that are either absent or whole."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import PathLike
from monai.data import NibabelWriter
from monai.transforms import Orientation, Transform
from nibabel.orientations import aff2axcodes

from custom.runs.files import part_of


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, writing to a hidden neighbour first and moving it in place when it is complete."""

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        """Write one file.

        Raises:
            OSError: naming the file, when the disk is full or the folder cannot be written; no partial file stays.
        """
        path = Path(filename)
        temporary = part_of(path)
        try:
            super().write(temporary, verbose, **obj_kwargs)
            os.replace(temporary, path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"{reason}; nothing was written, make room or change the folder", path
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


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
        """Write one case. Not by `SaveImage`: it turns a full disk into advice to install other writers.

        Raises:
            OSError: see :class:`AtomicNibabelWriter`.
        """
        os.makedirs(self.output_dir, exist_ok=True)
        volume = data[self.key]
        if self.original_axes:
            codes = "".join(aff2axcodes(np.asarray(volume.meta["original_affine"])))
            volume = Orientation(axcodes=codes, labels=None)(volume)
        writer = AtomicNibabelWriter(output_dtype=self.dtype)
        # Not `set_data_array`, which would drop a last axis of one voxel; bytes cannot be rounded.
        writer.data_obj = torch.round(volume[0].float(), decimals=self.digits)
        writer.set_metadata(volume.meta, resample=False)
        writer.write(os.path.join(self.output_dir, f"{data['case']}.nii.gz"))
        return dict(data)
