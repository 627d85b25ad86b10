"""Layer 2: NIfTI files that are either absent or whole."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import PathLike
from monai.data import NibabelWriter
from monai.transforms import SaveImage, Transform


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, writing to a hidden neighbour first and moving it in place when it is complete."""

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        """Write one file.

        Raises:
            OSError: when the disk is full or the folder cannot be written; no partial file keeps the final name.
        """
        path = Path(filename)
        temporary = path.with_name(f".partial_{os.getpid()}_{path.name}")
        try:
            super().write(temporary, verbose, **obj_kwargs)
            os.replace(temporary, path)
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
        self.saver = SaveImage(writer=AtomicNibabelWriter, output_dtype="int16", resample=False, print_log=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one case."""
        os.makedirs(self.output_dir, exist_ok=True)
        self.saver(torch.round(data[self.key]), filename=os.path.join(self.output_dir, data["case"]))
        return dict(data)
