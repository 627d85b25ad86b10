"""What rendering one case costs a user, from the command to the files: seconds and peak memory, by size and mode.

    python benchmarks/case_cost.py

Each row is the command of docs/GENERATOR.md with the shipped weights, in a process of its own, start of Python
included. Volumes are phantoms stretched to the sizes; at 0.35 x 0.35 x 0.5 mm the model works at 0.8 mm, at 1.5 mm as
it is. The mode without a template is left out where the bundle has no coarse.pt.
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

BUNDLE = TRAIN_CONFIG.parent.parent
SIZES = {  # voxels, mm
    "96": ((96, 96, 96), (1.5, 1.5, 1.5)),
    "256": ((256, 256, 256), (0.5625, 0.5625, 0.5625)),
    "512x512x275": ((512, 512, 275), (0.35, 0.35, 0.5)),
}
MEAN, NO_TEMPLATE, PAINTED = {"sample_strength": 0.0}, {"mode": "mask_only"}, {"mode": "painted"}
RUNS = [
    *[("96", {"sample_strength": 1.0, "sampling_steps": steps}) for steps in (1, 2, 4, 10)],
    ("96", MEAN),
    *[("96", {**NO_TEMPLATE, "coarse_steps": steps}) for steps in (1, 2, 4, 10, 20)],
    ("96", PAINTED),
    ("256", MEAN),
    ("256", NO_TEMPLATE),
    ("512x512x275", MEAN),
    ("512x512x275", NO_TEMPLATE),
    ("512x512x275", PAINTED),
    ("512x512x275", {"spacing_mm": [1.5, 1.5]}),
]


def make_volumes(folder: Path, size: str) -> None:
    """Two phantoms, stretched: image_0, label_0 (the template) and label_1 (the mask)."""
    shape, spacing = SIZES[size]
    folder.mkdir()
    for index in range(2):
        subject = make_subject(3, index)
        for kind, values, order in (("image", subject.image, 1), ("label", subject.label, 0)):
            zoom = [n / m for n, m in zip(shape, values.shape, strict=True)]
            large = ndimage.zoom(values, zoom, order=order)
            nib.save(placed_image(large, np.diag([*spacing, 1.0])), folder / f"{kind}_{index}.nii.gz")


def render(folder: Path, output: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak GiB of one command."""
    templates = [{"image": str(folder / "image_0.nii.gz"), "label": str(folder / "label_0.nii.gz")}]
    given = {"target_masks": [str(folder / "label_1.nii.gz")], "templates": templates, "output_dir": output, **options}
    return command_cost(["inference.json"], bundle=BUNDLE, **given)


def run(sizes: tuple[str, ...] = tuple(SIZES), out: str = str(RESULTS / "case_cost.json")) -> None:
    """Measure, print the table and write JSON.

    Args:
        sizes: of SIZES.
        out: JSON file.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            make_volumes(Path(name) / size, size)
            for index, (of_size, options) in enumerate(RUNS):
                if of_size == size and (options.get("mode") != "mask_only" or (BUNDLE / "models/coarse.pt").exists()):
                    cost = render(Path(name) / size, Path(name) / f"{index}", options)
                    rows.append({"size": size, **options, **cost})
                    logger.info("%s", rows[-1])
    write_json(Path(out), {"machine": machine(), "rows": rows})
    print("| size | options | s | GiB |\n|---|---|---|---|")
    for row in rows:
        given = {k: v for k, v in row.items() if k not in ("size", "seconds", "cpu_seconds", "peak_gib")}
        print(f"| {row['size']} | {given} | {row['seconds']:.0f} | {row['peak_gib']:.1f} |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(run)
