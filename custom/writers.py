"""Layer 2: NIfTI files that are either absent or whole."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import PathLike
from monai.data import NibabelWriter
from monai.transforms import Transform


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, writing to a hidden neighbour first and moving it in place when it is complete."""

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        """Write one file.

        Raises:
            OSError: naming the file, when the disk is full or the folder cannot be written; no partial file stays.
        """
        path = Path(filename)
        temporary = path.with_name(f".partial_{os.getpid()}_{path.name}")
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


class SaveRenderingd(Transform):
    """Write a rendered volume as `<output_dir>/<case>.nii.gz`, int16 HU, with its own affine.

    Args:
        key: the volume, (1, H, W, D) HU.
        output_dir: made when absent.
    """

    def __init__(self, key: str, *, output_dir: str) -> None:
        self.key, self.output_dir = key, output_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one case. Not by `SaveImage`: it turns a full disk into advice to install other writers.

        Raises:
            OSError: see :class:`AtomicNibabelWriter`.
        """
        os.makedirs(self.output_dir, exist_ok=True)
        volume = data[self.key]
        writer = AtomicNibabelWriter(output_dtype="int16")
        writer.data_obj = torch.round(volume[0])  # `set_data_array` would drop a last axis of one voxel
        writer.set_metadata(volume.meta, resample=False)
        writer.write(os.path.join(self.output_dir, f"{data['case']}.nii.gz"))
        return dict(data)
