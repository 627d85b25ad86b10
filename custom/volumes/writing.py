"""Volumes written as NIfTI files that are either absent or whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from custom.runs.files import replace_file
from custom.volumes.headers import placed_image
from custom.volumes.reading import file_of
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Transform
from nibabel.orientations import aff2axcodes


def check_finite(volume: torch.Tensor, name: str) -> None:
    """Refuse a result that is not finite: a file of whole numbers would show its NaN as 0, a label map as background.

    Args:
        volume: of any shape.
        name: file that it was to become, or was made from.

    Raises:
        ValueError: naming the file and how many voxels are concerned.
    """
    finite = torch.isfinite(torch.as_tensor(volume))
    if not bool(finite.all()):
        raise ValueError(
            f"{name}: the result is NaN or infinite in {int((~finite).sum())} of {finite.numel()} values, nothing was "
            "written; use the weights (`ckpt_dir`) of a training that did not diverge, and options that are numbers"
        )


class CheckFinited(MapTransform):
    """Refuse predictions that are not finite, naming the image they were made from. Changes nothing.

    Args:
        keys: the predictions.
        image_key: the image.

    Raises:
        ValueError: see :func:`check_finite`.
    """

    def __init__(self, keys: KeysCollection, *, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check one item."""
        for key in self.key_iterator(data):
            check_finite(data[key], file_of(data[self.image_key]))
        return dict(data)


def write_volume(path: Path, volume: MetaTensor, *, dtype: str, digits: int = 0) -> None:
    """Write a volume with its own affine, as qform and as sform. Not by `SaveImage`: it turns a full disk into advice.

    Args:
        path: NIfTI file, replaced atomically; its folder is made.
        volume: (1, H, W, D); it is rounded to `digits` after the point.
        dtype: of the file, "int16" for HU, "uint8" for label maps.
        digits: 0 for whole numbers.

    Raises:
        OSError: naming the file, when the disk is full or the folder cannot be written; no partial file stays.
        ValueError: naming the file, when the volume is not finite.
    """
    check_finite(volume, str(path))
    values = torch.round(volume[0].float(), decimals=digits).cpu().numpy()  # as floats: bytes cannot be rounded
    image = placed_image(values.astype(dtype), np.asarray(volume.affine.cpu(), dtype=float))
    replace_file(path, lambda part: nib.save(image, part))


class SaveVolumed(Transform):
    """Write a volume as `<output_dir>/<case>.nii.gz` with its own affine; a case may have folders in its name.

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
            OSError, ValueError: see :func:`write_volume`.
        """
        volume = data[self.key]
        if self.original_axes:
            codes = "".join(aff2axcodes(np.asarray(volume.meta["original_affine"])))
            volume = Orientation(axcodes=codes, labels=None)(volume)
        path = Path(self.output_dir, f"{data['case']}.nii.gz")
        write_volume(path, volume, dtype=self.dtype, digits=self.digits)
        return dict(data)
