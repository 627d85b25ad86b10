"""What each stage costs on a scan of real size, 512 x 512 x 275 voxels of 0.35 x 0.35 x 0.5 mm: seconds and memory.

    python benchmarks/real_size.py

Two phantoms as such scans, in LPS and gzip: the one is reference and template, the other is segmented. Each row is a
command of the guides with its options there, in a process of its own, start of Python included.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import RESULTS, TRAIN_CONFIG, command_cost, machine
from custom.phantom.cohort import make_subject
from custom.runs.files import write_json
from custom.volumes.headers import placed_image
from scipy import ndimage

logger = logging.getLogger(__name__)

GENERATOR = TRAIN_CONFIG.parent.parent
SEGMENTER = GENERATOR.parent / "structdiff_seg_cal"
SHAPE, SPACING_MM, PHANTOM_MM = (512, 512, 275), (0.35, 0.35, 0.5), 1.5
SEED = 2025  # of subjects that no shipped weights have seen
MASKS_MM = "[0.8,0.8,0.8]"


def make_scans(folder: Path) -> None:
    """image_<n> and label_<n> of two phantoms, air around them where the field is larger, with their datalist."""
    read = np.diag(SPACING_MM) / PHANTOM_MM
    place = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0])
    for index in range(2):
        subject = make_subject(SEED, index)
        start = (np.array(subject.image.shape) - 1) / 2 - read @ (np.array(SHAPE) - 1) / 2
        for kind, values, order, outside in (("image", subject.image, 1, -1000), ("label", subject.label, 0, 0)):
            large = ndimage.affine_transform(values, read, start, output_shape=SHAPE, order=order, cval=outside)
            nib.save(placed_image(large[::-1, ::-1], place), folder / f"{kind}_{index}.nii.gz")
    pairs = [{kind: f"{kind}_{index}.nii.gz" for kind in ("image", "label")} for index in range(2)]
    write_json(folder / "datalist.json", {"training": pairs[:1], "test": pairs[1:]})


def stages(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What is measured, in its order: name, and arguments of `command_cost`."""
    masks = {"bundle": GENERATOR, "run_id": "generating", "reference_datalist": folder / "datalist.json"}
    masks |= {"configs": ["generate_masks.json"], "spacing_mm": MASKS_MM, "output_dir": folder / "masks"}
    images = {"bundle": GENERATOR, "run_id": "synthesizing", "configs": ["inference.json", "synthesize.json"]}
    images |= {"mask_datalist": folder / "masks/datalist.json", "template_datalist": folder / "datalist.json"}
    scan = {"bundle": SEGMENTER, "configs": ["inference.json"], "images": [str(folder / "image_1.nii.gz")]}
    case = {"bundle": SEGMENTER, "configs": ["train.json", "evaluate.json"], "run_id": "evaluating"}
    return [
        ("reference prepared, one mask made", {**masks, "count": 1}),
        ("one mask more", {**masks, "count": 2}),
        ("two images rendered, with report", {**images, "output_dir": folder / "set"}),
        ("two images painted, with report", {**images, "mode": "painted", "output_dir": folder / "painted"}),
        ("scan segmented", {**scan, "output_dir": folder / "segmented"}),
        (
            "case segmented and measured",
            {**case, "datalists": [str(folder / "datalist.json")], "output_dir": folder / "evaluation"},
        ),
    ]


def run(out: str = str(RESULTS / "real_size.json")) -> None:
    """Measure, print the table and write JSON.

    Args:
        out: JSON file.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_scans(folder)
        for what, arguments in stages(folder):
            rows.append({"stage": what, **command_cost(**arguments)})
            logger.info("%s", rows[-1])
    write_json(Path(out), {"machine": machine(), "voxels": SHAPE, "spacing_mm": SPACING_MM, "rows": rows})
    print("| stage | s | CPU s | GiB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['stage']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {row['peak_gib']:.1f} |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(run)
