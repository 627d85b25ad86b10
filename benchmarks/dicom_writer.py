"""Writes the slices of a series as CT Image Storage: `python dicom_writer.py SLICES.npy SPEC`, for `dicom_series.py`.

Needs pydicom and numpy only, in an environment of their own.
"""

import json
import sys
from pathlib import Path

import numpy as np


def write(slices: Path, spec: dict) -> None:
    """A file for each slice (D, H, W) that is not missing, beside `slices`."""
    from pydicom.uid import generate_uid

    uid = spec["uid"] or generate_uid()
    for number, hu in enumerate(np.load(slices)):
        if number not in spec["missing"]:
            name = f"{number * 7919 % 1000:03d}_{uid[-6:]}_{spec['add_hu']:g}.dcm"
            _slice(hu, number, uid, spec).save_as(slices.with_name(name), enforce_file_format=True)


def _slice(hu: np.ndarray, number: int, uid: str, spec: dict):
    """One file: what CT Image Storage asks for."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

    slope = spec["slopes"][number % len(spec["slopes"])]
    stored = np.round((hu - spec["intercept"]) / slope).clip(0, 65535).astype(np.uint16)
    row, column, step, first = (np.array(spec[key]) for key in ("row", "column", "step", "first"))
    place = first + (number + spec["shifted"].get(str(number), 0.0) / spec["slice_mm"]) * step
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.StudyInstanceUID = uid, generate_uid(entropy_srcs=["study"])
    data.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
    data.Modality, data.PatientName, data.PatientID, data.StudyID = "CT", "Phantom", "1", "1"
    data.Manufacturer, data.ImageType = "SIEMENS", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.StudyDate, data.StudyTime, data.AcquisitionTime = "20240101", "120000", "120000"
    data.SeriesDescription, data.SeriesNumber, data.AcquisitionNumber = spec["description"], 3, 1
    data.InstanceNumber = number + 1
    data.PatientPosition = "FFS" if spec["feet_first"] else "HFS"
    data.ImagePositionPatient = [f"{x:.8g}" for x in place]
    directions = [*row / spec["pixel_mm"], *column / spec["pixel_mm"]]
    data.ImageOrientationPatient = [f"{x:.8f}" for x in directions]
    data.PixelSpacing, data.SliceThickness = [spec["pixel_mm"]] * 2, spec["slice_mm"]
    data.GantryDetectorTilt = spec["tilt_degrees"]
    data.KVP, data.RescaleType = 120, "HU"
    data.RescaleSlope, data.RescaleIntercept = slope, spec["intercept"]
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    bits = 12 if stored.max() < 4096 else 16
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelData = stored.tobytes()
    data["PixelData"].VR = "OW"
    if spec["compressed"]:
        data.compress(RLELossless)
    return data


if __name__ == "__main__":
    write(Path(sys.argv[1]), json.loads(sys.argv[2]))
