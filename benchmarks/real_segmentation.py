"""Do the shipped segmenter's weights, which have seen no patient, find the heart in a real CTA?

    python benchmarks/real_segmentation.py --data_dir ../shared/data --work_dir runs/real_segmentation
    python benchmarks/real_segmentation.py --data_dir ../shared/data --work_dir runs/real_segmentation \
        --weights "{'shipped':'bundles/structdiff_seg_cal/models','before':'runs/weights_before'}"

One scan chooses nothing: weights are chosen by phantoms, and this is looked at when they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import ANATOMY, PICTURES, RESULTS, machine
from custom.geometry.centrelines import cl_dice
from custom.runs.files import file_hash, write_json
from custom.volumes.pictures import read_ras, save_mask_sheet
from downstream import LABEL_NAMES, SEGMENTER, bundle_run, once
from scipy import ndimage

FAR_MM = 10.0  # from any true label; ours: what lies there is in another organ


def measure(found: Path, truth: Path) -> dict[str, dict[str, float]]:
    """Dice, and ml that lie more than 10 mm from the whole true heart, of every label; clDice of thin ones."""
    image: Any = nib.load(truth)
    spacing = [float(s) for s in image.header.get_zooms()[:3]]
    label, predicted = (np.asarray(nib.load(path).dataobj).round().astype(int) for path in (truth, found))
    label[label >= len(LABEL_NAMES)] = 0
    far = ndimage.distance_transform_edt(label == 0, sampling=spacing) > FAR_MM
    rows = {}
    for k, name in enumerate(LABEL_NAMES[1:], 1):
        own, true = predicted == k, label == k
        both = int(own.sum() + true.sum())
        rows[name] = {
            "dice": float(2 * (own & true).sum() / both) if both else float("nan"),
            "far_ml": float((own & far).sum() * np.prod(spacing) / 1000),
        }
        if k in ANATOMY.thin:
            rows[name]["cl_dice"] = cl_dice(own, true)
    return rows


def main(
    data_dir: str,
    work_dir: str = "runs/real_segmentation",
    weights: Mapping[str, str] | None = None,
    out: str = str(RESULTS / "real_segmentation.json"),
    picture: str = str(PICTURES / "real_segmentation.png"),
) -> None:
    """Segment the CTA; print measures by label, write JSON and a picture.

    Args:
        data_dir: folder with real_cta/image.nii.gz and real_cta/label_derived.nii.gz.
        work_dir: of the label maps, which are kept.
        weights: name -> folder with `model.pt`; None takes those that are shipped.
        out, picture: files to write.
    """
    image, truth = (Path(data_dir).resolve() / f"real_cta/{name}.nii.gz" for name in ("image", "label_derived"))
    table, rows = {}, [("derived labels", read_ras(truth).round())]
    for name, folder in (weights or {"shipped": str(SEGMENTER / "models")}).items():
        folder = str(Path(folder).resolve())
        place = Path(work_dir).resolve() / file_hash(str(Path(folder) / "model.pt"))[:8]
        options = {"images": [str(image)], "output_dir": place, "ckpt_dir": folder}
        found = once(
            place / "image_seg.nii.gz", lambda o=options: bundle_run("run", SEGMENTER, ["inference.json"], **o)
        )
        table[name] = measure(found, truth)
        rows.append((name, read_ras(found).round()))
    rows[0][1][rows[0][1] >= len(LABEL_NAMES)] = 0
    save_mask_sheet(picture, rows, vessel_labels=ANATOMY.thin)
    write_json(Path(out), {"machine": machine(), "far_mm": FAR_MM, "weights": table})
    for name, by_label in table.items():
        print(f"{name}:")
        for label, row in by_label.items():
            print(f"    {label:22s} " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(main)
