"""NIfTI headers that say where a volume lies: written for all programs alike, refused where they differ."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike, NDArray

__all__ = ["TOLERANCE_VOXELS", "check_ending", "check_header", "corners_apart_mm", "placed_image"]

TOLERANCE_VOXELS = 0.1  # ours: headers in single precision are off by less, a shift that matters by more
_ENDINGS = (".nii", ".nii.gz")
_FLAT = 1e-6  # ours: volume of a voxel over the product of its edges; a shear that a scanner makes is far above
_OPEN, _SAVE = "in Python: import nibabel; image = nibabel.load(FILE);", "; nibabel.save(image, NEW_FILE)"
_KEEP = f"{_OPEN} image.set_sform(None, 0) keeps the qform, image.set_qform(None, 0) the sform{_SAVE}"


def check_ending(file: str) -> None:
    """Refuse a file of another format than NIfTI by its name.

    Raises:
        ValueError: naming the file and how to convert it.
    """
    if not file.lower().endswith(_ENDINGS):
        raise ValueError(
            f"{file}: only NIfTI files are read, which end in {' or '.join(_ENDINGS)}, got {Path(file).name}; convert "
            "it first, in 3D Slicer by Save Data, or in Python by SimpleITK.WriteImage(SimpleITK.ReadImage(FILE), "
            "'NAME.nii.gz')"
        )


def corners_apart_mm(size: ArrayLike, first: ArrayLike, second: ArrayLike) -> float:
    """Largest distance of a corner of a grid (H, W, D) under two affines; NaN when one of them is."""
    corners = np.array(list(product(*((0.0, n - 1.0) for n in np.asarray(size).tolist()))))
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return float(np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max())


def placed_image(values: NDArray, affine: NDArray) -> nib.Nifti1Image:
    """A NIfTI image (H, W, D) whose qform and sform both say that it lies at `affine`, in mm; a shear has no qform."""
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    if corners_apart_mm(values.shape, affine, image.get_qform()) > TOLERANCE_VOXELS * min(image.header.get_zooms()):
        image.set_qform(None, code=0)
    return image


def check_header(image: Any, file: str) -> None:
    """Refuse a header whose qform, sform and voxel sizes are no place, or not the same one, or that has neither form.

    What has fewer than three axes is left to the check of the volume.

    Args:
        image: as `nibabel.load` gives it.
        file: named in messages.

    Raises:
        ValueError: naming the file, what contradicts what, and which commands mend it.
    """
    size = image.shape[:3]
    if len(size) < 3:
        return
    pixdim = _voxel_sizes_mm(image, file)
    qform, sform = _qform(image, file), _sform(image, file)
    if qform is None and sform is None:
        raise ValueError(
            f"{file}: the header must say where the volume lies, got qform and sform of code 0, which programs put at "
            "different places and turn differently; convert the scan anew, or, if you know that its axes point to "
            f"{', '.join(nib.aff2axcodes(image.affine))}, {_OPEN} image.set_sform(image.affine, 1){_SAVE}"
        )
    where = "no more than a tenth of a voxel"
    if sform is not None:
        edges = np.linalg.norm(sform[:3, :3], axis=0)
        if (np.abs(edges - pixdim) * np.maximum(np.array(size) - 1, 1)).max() > TOLERANCE_VOXELS * pixdim.min():
            raise ValueError(
                f"{file}: voxel sizes in the header must agree to {where} over the volume, got {_short(edges)} mm by "
                f"the sform and {_short(pixdim)} mm by pixdim; correct the wrong one, {_OPEN} "
                f"image.header['pixdim'][1:4] = {_short(edges)} keeps the sform, "
                f"image.set_sform(None, 0) the rest{_SAVE}"
            )
    if sform is not None and qform is not None:
        apart = corners_apart_mm(size, qform, sform)
        if not apart <= TOLERANCE_VOXELS * pixdim.min():
            codes = f"of code {int(image.header['qform_code'])}", f"of code {int(image.header['sform_code'])}"
            raise ValueError(
                f"{file}: qform and sform must agree to {where}, got a corner {apart:.3g} mm apart: the first voxel "
                f"lies at {_short(qform[:3, 3])} mm by the qform {codes[0]}, at {_short(sform[:3, 3])} mm by the sform "
                f"{codes[1]}, and programs differ in which they read; keep the one under which image and label lie "
                f"where the patient was, mostly that of code 1, the scanner's, {_KEEP}"
            )


def _short(values: NDArray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _voxel_sizes_mm(image: Any, file: str) -> NDArray[np.float64]:
    """`pixdim` as it stands in the file: nibabel itself reads 0 as 1 mm."""
    with image.file_map["image"].get_prepare_fileobj("rb") as stream:
        pixdim = type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4].astype(float)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise ValueError(
            f"{file}: voxel sizes (pixdim) must be lengths in mm above 0, got {_short(pixdim)}; convert the scan anew, "
            f"or correct the header, {_OPEN} image.header['pixdim'][1:4] = LENGTHS{_SAVE}"
        )
    return pixdim


def _qform(image: Any, file: str) -> NDArray[np.float64] | None:
    try:
        qform = image.header.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError) as error:
        raise ValueError(f"{file}: the qform must be a rotation, got none ({error}); {_KEEP}") from error
    if qform is not None and not np.isfinite(qform).all():
        raise ValueError(f"{file}: the qform must be finite, got {qform[:3].tolist()}; {_KEEP}")
    return qform


def _sform(image: Any, file: str) -> NDArray[np.float64] | None:
    sform = image.header.get_sform(coded=True)[0]
    if sform is None:
        return None
    edges = np.linalg.norm(sform[:3, :3], axis=0)
    if not (np.isfinite(sform).all() and abs(np.linalg.det(sform[:3, :3])) > _FLAT * edges.prod()):
        raise ValueError(f"{file}: the sform must be finite and not flat, got {sform[:3].tolist()}; {_KEEP}")
    return sform
