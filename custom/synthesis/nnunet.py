"""A list of cases as a raw data set of nnU-Net v2."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from custom.runs.files import make_folder, replace_file, write_json
from custom.volumes.anatomy import Anatomy
from custom.volumes.cases import load_cases
from custom.volumes.reading import LoadVolumesd, read_labels
from custom.volumes.writing import write_volume
from monai.transforms import Compose, EnsureChannelFirstd

logger = logging.getLogger(__name__)

_NAME = re.compile(r"Dataset\d{3}_\w+")  # what nnU-Net looks for
_ENDING = ".nii.gz"


def export_nnunet(
    datalist: str,
    export_dir: str,
    *,
    labels: Anatomy,
    label_mapping: Mapping[str, Sequence[int]],
    section: str = "training",
) -> int:
    """Write `imagesTr`, `labelsTr`, `confidenceTr` where there is confidence, and last `dataset.json`.

    nnU-Net does not read confidence; it lies beside for those who do.

    Args:
        datalist: of a synthetic set, or of real cases.
        export_dir: folder named as nnU-Net wants it, `DatasetNNN_Name`; new, or of the same export.
        labels: names and ids.
        label_mapping: "from" and "to" ids, for label maps that no stage has written.
        section: of the list.

    Returns:
        number of cases.

    Raises:
        ValueError: for another name of the folder, or one that holds another export.
        FileNotFoundError: naming what is not there.
    """
    root = Path(export_dir).expanduser()
    if not _NAME.fullmatch(root.name):
        raise ValueError(
            f"export_dir: nnU-Net wants a folder DatasetNNN_Name of three digits and a name, got {root.name!r}; for "
            "example nnUNet_raw/Dataset501_Synthetic"
        )
    cases = load_cases(datalist, section, extra_files=("confidence",))
    wanted = {f"{case['case']}{_ENDING}" for case in cases}
    if other := sorted({path.name for path in root.glob("labelsTr/*")} - wanted):
        raise ValueError(f"export_dir: {root} holds cases that are not in {datalist}: {other[:5]}; choose a new folder")
    for folder in ("imagesTr", "labelsTr"):
        make_folder(str(root / folder))
    for number, case in enumerate(cases, start=1):
        _write_image(case["image"], root / "imagesTr" / f"{case['case']}_0000{_ENDING}")
        write_volume(root / "labelsTr" / f"{case['case']}{_ENDING}", read_labels(case, label_mapping), dtype="uint8")
        if "confidence" in case:
            _write_image(case["confidence"], root / "confidenceTr" / f"{case['case']}{_ENDING}", digits=2)
        logger.info("case %d of %d: %s", number, len(cases), case["case"])
    described = {
        "channel_names": {"0": "CT"},
        "labels": {name: k for k, name in enumerate(labels.names)},
        "numTraining": len(cases),
        "file_ending": _ENDING,
    }
    write_json(root / "dataset.json", described, option="export_dir")
    return len(cases)


def _write_image(file: str, path: Path, digits: int = 0) -> None:
    """Copy a compressed file as it is; write another one anew, images as whole HU."""
    if file.lower().endswith(_ENDING):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda part: shutil.copyfile(file, part), option="export_dir")
    else:
        volume = Compose([LoadVolumesd("image"), EnsureChannelFirstd("image")])({"image": file})["image"]
        write_volume(path, volume, dtype="float32" if digits else "int16", digits=digits)
