"""Does a segmenter that has seen phantoms and synthetic volumes, but no real voxel, find the heart in a real CTA?

    python benchmarks/real_segmentation.py --data_dir ../shared/data --phantoms runs/real_input/phantoms/datalist.json \
        --synthetic runs/synthetic_cta/datalist.json --work_dir runs/real_segmentation

The synthetic volumes are made in the appearance of the CTA, some of them of its own deformed masks, and the generator
was trained on it: this shows that what was learned carries over to real voxels, not how it does on another patient.
The shipped weights, which nothing of the CTA went into, segment it beside.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import PICTURES, RESULTS, machine
from custom.runs.files import file_hash, write_json
from custom.volumes.pictures import read_ras, save_mask_sheet
from downstream import LABEL_NAMES, SEGMENTER, absolute, bundle_run, listing, once

OPTIONS = {"spacing_mm": [2.0, 2.0, 2.0], "roi_size": [48, 48, 48], "network_def#init_filters": 8}


def label_dice(found: Path, truth: Path) -> dict[str, float]:
    """Dice of every label; NaN where neither has it."""
    predicted, label = (np.asarray(nib.load(path).dataobj).round().astype(int) for path in (found, truth))
    dice = {}
    for k, name in enumerate(LABEL_NAMES[1:], 1):
        both = (predicted == k).sum() + (label == k).sum()
        dice[name] = float(2 * ((predicted == k) & (label == k)).sum() / both) if both else float("nan")
    return dice


def main(data_dir: str, phantoms: str, synthetic: str, work_dir: str = "runs/real_segmentation") -> None:
    """Train, segment the CTA, print Dice by label and write benchmarks/results/real_segmentation.json and a picture.

    Args:
        data_dir: folder with real_cta/image.nii.gz and real_cta/label_derived.nii.gz.
        phantoms: datalist of a phantom cohort.
        synthetic: datalist of a synthetic set in the appearance of the CTA.
        work_dir: cache of the trained weights.
    """
    work = Path(work_dir).resolve()
    image, truth = (Path(data_dir).resolve() / f"real_cta/{name}.nii.gz" for name in ("image", "label_derived"))
    cases = absolute(Path(synthetic).resolve(), "training")

    def train() -> None:
        bundle_run(
            "pretraining",
            SEGMENTER,
            ["train.json", "pretrain.json"],
            synthetic_datalists=[listing(work / "synthetic.json", cases)],
            real_datalists=[str(Path(phantoms).resolve())],
            real_share=0.5,
            max_epochs=50,
            output_dir=work / "pretraining",
            ckpt_dir=work / "models",
            best_weights=work / "models/model.pt",
            **{"validate#dataset#data": []},
            **OPTIONS,
        )

    def segment(folder: Path, weights: Path, **options: Any) -> Path:
        places = {"output_dir": folder, "ckpt_dir": weights}
        return once(
            folder / "image_seg.nii.gz",
            lambda: bundle_run("run", SEGMENTER, ["inference.json"], images=[str(image)], **places, **options),
        )

    once(work / "models/model.pt", train)
    found = segment(work / "segmented", work / "models", **OPTIONS)
    of_weights = f"segmented_shipped_{file_hash(str(SEGMENTER / 'models/model.pt'))[:8]}"  # those may be trained anew
    shipped = segment(work / of_weights, SEGMENTER / "models")
    dice, dice_shipped = (label_dice(path, truth) for path in (found, shipped))
    titles = ("derived labels", "segmented", "segmented by the shipped weights")
    rows = [(title, read_ras(path).round()) for title, path in zip(titles, (truth, found, shipped), strict=True)]
    rows[0][1][rows[0][1] >= len(LABEL_NAMES)] = 0
    save_mask_sheet(PICTURES / "real_segmentation.png", rows, vessel_labels=[LABEL_NAMES.index("coronary arteries")])
    result = {"machine": machine(), "synthetic": len(cases), "dice": dice, "dice_shipped": dice_shipped}
    write_json(RESULTS / "real_segmentation.json", result)
    print("| label | Dice | shipped weights |\n|---|---|---|")
    for name, value in dice.items():
        print(f"| {name} | {value:.2f} | {dice_shipped[name]:.2f} |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(main)
