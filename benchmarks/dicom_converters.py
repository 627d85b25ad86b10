"""Which program makes NIfTI in HU, at its place, of a DICOM series, and which makes a wrong one.

    python benchmarks/dicom_converters.py --phantom runs/phantoms/images/subject_000.nii.gz \
        --python PROGRAMS/bin/python --pydicom FOLDER

A phantom is looked up at the voxels of made series, each awkward in one way, and at those of what a program wrote: the
table has the 95th percentile of the difference in HU, half a stored step where all is right, or "refused".
PROGRAMS is an environment with dicom2nifti, dcm2niix and SimpleITK; FOLDER has pydicom alone, which MONAI's reader
needs (`pip install --no-deps --target FOLDER pydicom`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import RESULTS, machine
from custom.runs.files import write_json
from dicom_series import Series, Volume, write_series

logger = logging.getLogger(__name__)

ONE = {
    "rescale slope 0.5": Series(slopes=(0.5,), intercept=-1000.0),
    "a slope for each slice": Series(slopes=(0.5, 1.0, 2.0), intercept=-1000.0),
    "feet first": Series(feet_first=True),
    "turned image plane": Series(turn_degrees=12.0),
    "compressed (RLE)": Series(compressed=True),
    "gantry tilt 15 degrees": Series(tilt_degrees=15.0),
    "a slice missing": Series(missing=(17,)),
    "uneven slices": Series(shifted=dict.fromkeys(range(20, 36), 1.2)),
}
"""Series alone in a folder."""
TWO = {"two series in a folder": False, "two phases in a series": True}
"""Two phases in a folder: whether they are one series."""
PHASE_HU = 50
SIMPLE_ITK = """
import sys, SimpleITK as sitk
names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(sys.argv[1])
sitk.WriteImage(sitk.ReadImage(names), sys.argv[2] + "/volume.nii.gz")
"""
MONAI = """
import sys
from monai.transforms import EnsureChannelFirst, LoadImage, SaveImage
volume = EnsureChannelFirst()(LoadImage(reader="PydicomReader")(sys.argv[1]))
SaveImage(output_dir=sys.argv[2], output_ext=".nii.gz", separate_folder=False, print_log=False)(volume)
"""


def converters(python: Path) -> dict[str, list[str]]:
    """Name -> command, to which the folders of input and output are appended; for dcm2niix output first."""
    dicom2nifti = str(python.with_name("dicom2nifti"))
    return {
        "dicom2nifti": [dicom2nifti],
        "dicom2nifti -G": [dicom2nifti, "-G"],
        "dicom2nifti -G -r": [dicom2nifti, "-G", "-r", "-o", "1", "-p", "-1024"],
        "dcm2niix": [str(python.with_name("dcm2niix")), "-b", "n", "-z", "i", "-f", "1", "-o"],
        "SimpleITK": [str(python), "-c", SIMPLE_ITK],
        "MONAI PydicomReader": [sys.executable, "-c", MONAI],
    }


def write_folders(volume: Volume, root: Path, python: str) -> dict[str, Path]:
    """A folder of DICOM files for each row of the table."""
    folders = {name: root / str(number) for number, name in enumerate([*ONE, *TWO])}
    for name, series in ONE.items():
        write_series(volume, series, folders[name], python=python)
    for name, one_series in TWO.items():
        for uid, add_hu in (("1.2.3", 0), ("1.2.3" if one_series else "1.2.4", PHASE_HU)):
            phase = Series(description=f"phase {add_hu}")
            write_series(volume, phase, folders[name], python=python, uid=uid, add_hu=add_hu)
    return folders


def error_hu(file: Path, volume: Volume, scanned: Series) -> float | None:
    """95th percentile of the difference from the phantom, at voxels well within the scan; None of what is no volume."""
    image = nib.load(file)
    hu = np.asarray(image.dataobj, np.float32)
    if hu.ndim != 3:
        return None
    grid = np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), -1)
    places = grid @ image.affine[:3, :3].T + image.affine[:3, 3]
    inverse = np.linalg.inv(scanned.affine(volume.centre))
    at = places @ inverse[:3, :3].T + inverse[:3, 3]
    limits = np.array([scanned.size[0], scanned.size[0], scanned.size[1]]) - 2
    inside = ((at >= 1) & (at <= limits)).all(-1)
    difference = hu[inside] - volume.at(places[inside])
    return min(float(np.percentile(np.abs(difference - shift), 95)) for shift in (0, PHASE_HU))


def judge(name: str, command: list[str], source: Path, out: Path, volume: Volume, pydicom: str) -> dict[str, Any]:
    """Run a converter; what it wrote and how far that is off."""
    out.mkdir(parents=True)
    last = [str(out), str(source)] if command[-1] == "-o" else [str(source), str(out)]
    env = {**os.environ, "PYTHONPATH": pydicom if command[0] == sys.executable else ""}
    done = subprocess.run([*command, *last], capture_output=True, text=True, env=env)
    errors = {f.name: error_hu(f, volume, ONE.get(name, Series())) for f in sorted(out.glob("*.nii.gz"))}
    return {"written": errors, "exit": done.returncode}


def cell(result: dict[str, Any]) -> str:
    """What a table says of a result."""
    if not result["written"]:
        return "refused"
    return ", ".join("4D" if error is None else f"{error:.1f}" for error in result["written"].values())


def main(phantom: str, python: str, pydicom: str) -> None:
    """Compare the converters and write `results/dicom_converters.json`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    volume, table = Volume.load(Path(phantom)), {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = write_folders(volume, Path(temporary) / "dicom", python)
        for number, (name, source) in enumerate(folders.items()):
            table[name] = {
                tool: judge(
                    name, command, source, Path(temporary) / f"{number}" / tool.replace(" ", "_"), volume, pydicom
                )
                for tool, command in converters(Path(python).absolute()).items()
            }
            logger.info("%s | %s", name, " | ".join(f"{tool}: {cell(result)}" for tool, result in table[name].items()))
    write_json(RESULTS / "dicom_converters.json", {"machine": machine(), "error_hu_p95": table})


if __name__ == "__main__":
    fire.Fire(main)
