"""Mode "painted": what one mask looks like under eight seeds, and whether air, lung, fat, muscle and bone stay theirs.

    python benchmarks/painted.py --dataset_dir runs/phantoms

Paints the first held-out mask around the template of a training case by inference.json, without any weights, and once
more with all artefacts. Printed are mean HU of tissues, told apart in the template, and of labels: of the template, and
lowest and highest over the seeds; and seconds a volume, registration of the template apart.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import fire
import numpy as np
from common import ANATOMY, PICTURES, RESULTS, TRAIN_CONFIG, machine
from custom.diffusion.painted_transforms import PaintTissuesd
from custom.runs.files import write_json
from custom.volumes.cases import load_cases
from custom.volumes.pictures import save_sheet
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy import ndimage

logger = logging.getLogger(__name__)

MARGIN_VOXELS = 10  # around the heart, in the picture
TISSUES = {"air": (-1024, -970), "lung": (-940, -700), "fat": (-120, -70), "muscle": (20, 80), "bone": (450, 3071)}
ARTEFACTS = ["plaques", "streaks", "motion"]


def _parser(**options: Any) -> ConfigParser:
    """The shipped inference config in mode "painted"; no weights are read."""
    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG.parent / "inference.json"))
    parser.update({"bundle_root": str(TRAIN_CONFIG.parent.parent), "mode": "painted", **options})
    parser.parse()
    return parser


def _painted(item: dict[str, Any], **options: Any) -> np.ndarray:
    """Image (H, W, D) of an item whose template is aligned."""
    parser = _parser(**options)
    (paint,) = (t for t in parser.get_parsed_content("appearance") if isinstance(t, PaintTissuesd))
    made = paint(item)
    made["pred"] = MetaTensor(made["prior"].as_tensor(), meta=item["label"].meta)
    image: np.ndarray = parser.get_parsed_content("finish")(made)["pred"][0].numpy()
    return image


def _aligned(case: dict[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    """Mask and aligned template, as inference.json has them before it paints."""
    item = {"label": case["label"], "case": "one", **{f"template_{k}": template[k] for k in ("image", "label")}}
    for transform in _parser().get_parsed_content("preprocessing").transforms:
        if isinstance(transform, PaintTissuesd):
            break
        item = transform(item)
    return item


def _ids(volume: Any) -> np.ndarray:
    ids: np.ndarray = volume[0].numpy().round().astype(np.int64)
    return ids


def _heart(label: np.ndarray) -> tuple[slice, ...]:
    """Box of all labels and a margin."""
    (box,) = ndimage.find_objects((label > 0).astype(int))
    return tuple(slice(max(axis.start - MARGIN_VOXELS, 0), axis.stop + MARGIN_VOXELS) for axis in box)


def _regions(item: dict[str, Any]) -> dict[str, np.ndarray]:
    """Where a tissue or label lies, without its outermost voxels; those of tissues are told by the template's HU."""
    label, template = _ids(item["label"]), item["template_image"][0].numpy()
    outside = ndimage.binary_erosion((label == 0) & (_ids(item["template_label"]) == 0), iterations=2)
    found = {name: outside & (template > low) & (template < high) for name, (low, high) in TISSUES.items()}
    inside = {name: ndimage.binary_erosion(label == k) for k, name in enumerate(ANATOMY.names) if k > 0}
    return {name: region for name, region in {**found, **inside}.items() if region.any()}


def run(
    dataset_dir: str,
    seeds: int = 8,
    out: str = str(RESULTS / "painted.json"),
    picture: str = str(PICTURES / "painted.png"),
) -> None:
    """Paint, print the table, write JSON and a picture.

    Args:
        dataset_dir: phantoms with "training" and "test".
        seeds: so many volumes.
        out, picture: files to write.
    """
    datalist = str(Path(dataset_dir) / "datalist.json")
    item = _aligned(load_cases(datalist, "test")[0], load_cases(datalist, "training")[0])
    label = _ids(item["label"])
    box, regions = _heart(label), _regions(item)
    sheet = [
        ("template, aligned, without grain", item["template_image"][0].numpy()[box], _ids(item["template_label"])[box])
    ]
    means, seconds = [], []
    for seed in range(seeds):
        start = time.perf_counter()
        image = _painted(item, seed=seed)
        seconds.append(time.perf_counter() - start)
        means.append([float(image[region].mean()) for region in regions.values()])
        sheet.append((f"seed {seed}", image[box], label[box]))
    sheet.append(("seed 0 with all artefacts", _painted(item, seed=0, painted_artefacts=ARTEFACTS)[box], label[box]))
    own = [float(item["template_image"][0].numpy()[region].mean()) for region in regions.values()]
    lows, highs = np.min(means, 0).tolist(), np.max(means, 0).tolist()
    table = {
        name: {"template": of, "lowest": low, "highest": high}
        for name, of, low, high in zip(regions, own, lows, highs, strict=True)
    }
    write_json(Path(out), {"machine": machine(), "seeds": seeds, "seconds": float(np.median(seconds)), "hu": table})
    save_sheet(picture, sheet, vessel_labels=ANATOMY.thin)
    print(f"{np.median(seconds):.1f} s a volume\n| HU of | template | painted |\n|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['template']:.0f} | {row['lowest']:.0f} to {row['highest']:.0f} |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(run)
