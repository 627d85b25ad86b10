"""Coronaries on the grid of a scanner: what is left of them after rendering at the model's spacing and coming back.

    python benchmarks/native_grid.py --ckpt_dir bundles/structdiff_cardiac/models

Phantoms of 0.5 mm are rendered by inference.json at several spacings, each mask in the template of another subject and
in its own. Measured is the image as it is written, on the mask's own grid: mean HU along the centre lines over that of
the template's scan along its own, the share of the lines above half contrast, and pieces of the tree on the model's
grid.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import ANATOMY, PICTURES, RESULTS, ROOT, TRAIN_CONFIG, machine, trained_renderer
from custom.evaluation.rendering import vessel_regions
from custom.geometry.centrelines import skeleton
from custom.geometry.topology import betti_numbers
from custom.phantom.cohort import make
from custom.runs.files import write_json
from custom.volumes.grids import InvertImaged
from custom.volumes.pictures import save_sheet
from monai.data import MetaTensor
from scipy import ndimage

logger = logging.getLogger(__name__)

SEED, SHAPE, GRID_MM = 11, (256, 256, 256), 0.5
SPACINGS_MM = (0.8, 1.5)
THIN = ANATOMY.thin


class Lines:
    """Centre lines of a mask on its own grid, and what an image shows along them.

    Args:
        label: (H, W, D) ids.
    """

    def __init__(self, label: np.ndarray) -> None:
        self.label, self.vessel = label, np.isin(label, THIN)
        self.line = skeleton(self.vessel)

    def measure(self, image: np.ndarray, half_hu: float | None = None) -> dict[str, float]:
        """Mean HU of the line, and the share of it above a threshold; None is half of the image's own contrast."""
        along = ndimage.uniform_filter(image.astype(np.float32), 3)[self.line]
        if half_hu is None:
            _, around, _ = vessel_regions(image, self.label, THIN, [GRID_MM] * 3)
            half_hu = float(image[self.vessel].mean() + image[around].mean()) / 2
        return {"line_hu": float(along.mean()), "above_half": float((along > half_hu).mean()), "half_hu": half_hu}


def _volumes(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    image, label = (np.asarray(nib.load(folder / kind / f"{name}.nii.gz").dataobj) for kind in ("images", "labels"))
    return image.astype(np.float32), label.astype(np.int64)


def _rendered(parser: Any, mask: Path, template: dict[str, str]) -> tuple[np.ndarray, np.ndarray, float]:
    """Image on the mask's grid, label map on the model's, and seconds."""
    started = time.perf_counter()
    case = {"label": str(mask), "case": mask.name, **{f"template_{k}": v for k, v in template.items()}}
    item = parser.get_parsed_content("preprocessing")(case)
    network, inferer = parser.get_parsed_content("network"), parser.get_parsed_content("inferer")
    drawn = inferer(item["context"][None], network, [item["case"]])[0]
    item["pred"] = MetaTensor(drawn, meta=item["label"].meta)
    item = InvertImaged("pred", "label")(parser.get_parsed_content("finish")(item))
    image, label = (item[key].as_tensor()[0].numpy() for key in ("pred", "label"))
    return image, label.astype(np.int64), time.perf_counter() - started


def run(
    ckpt_dir: str = str(TRAIN_CONFIG.parent.parent / "models"),
    work_dir: str = str(ROOT / "runs/native_grid"),
    subjects: int = 3,
    spacings: tuple[float, ...] = SPACINGS_MM,
    grain: float = 1.0,
    out: str = str(RESULTS / "native_grid.json"),
    picture: str = str(PICTURES / "native_grid.png"),
) -> None:
    """Render all pairs at all spacings; print the table, write JSON and a picture.

    Args:
        ckpt_dir: with model.pt.
        work_dir: of the phantoms, some 15 GiB of memory while they are made; they are kept.
        subjects: phantoms.
        spacings: of the model, mm.
        grain: as in inference.json.
        out, picture: files to write.
    """
    folder = Path(work_dir)
    names = [f"subject_{index:03d}" for index in range(subjects)]
    if not (folder / "datalist.json").exists():
        make(str(folder), subjects=subjects, shape=SHAPE, spacing_mm=GRID_MM, seed=SEED)
    scans = {name: _volumes(folder, name) for name in names}
    lines = {name: Lines(label) for name, (_, label) in scans.items()}
    own = {name: lines[name].measure(image) for name, (image, _) in scans.items()}
    rows: list[dict[str, Any]] = []
    sheet = [(f"{names[0]}, the scan", *scans[names[0]])]
    for spacing in spacings:
        parser = trained_renderer(ckpt_dir, spacing_mm=[spacing, spacing], grain=grain)
        for k, name in enumerate(names):
            for source in (name, names[(k + 1) % subjects]):
                template = {kind: str(folder / f"{kind}s" / f"{source}.nii.gz") for kind in ("image", "label")}
                image, label, seconds = _rendered(parser, folder / "labels" / f"{name}.nii.gz", template)
                found = lines[name].measure(image, own[source]["half_hu"])
                truth = lines[name].measure(scans[name][0])
                pieces = [betti_numbers(np.isin(mask, THIN))[0] for mask in (label, scans[name][1])]
                row = {"spacing_mm": spacing, "mask": name, "template": source, "seconds": seconds, **found}
                row |= {"template_line_hu": own[source]["line_hu"], "own_above_half": truth["above_half"]}
                row |= {"line_ratio": found["line_hu"] / own[source]["line_hu"], "pieces": pieces}
                rows.append(row)
                logger.info("%s", row)
                if k == 0 and source != name:
                    sheet.append((f"{name} from {source} at {spacing} mm", image, scans[name][1]))
    table = []
    for spacing in spacings:
        for what in ("own", "other"):
            kept = [r for r in rows if r["spacing_mm"] == spacing and (r["mask"] == r["template"]) == (what == "own")]
            means = {key: float(np.mean([r[key] for r in kept])) for key in ("line_ratio", "above_half", "seconds")}
            whole = all(r["pieces"][0] == r["pieces"][1] for r in kept)
            table.append({"spacing_mm": spacing, "template": what, **means, "trees_whole": whole})
    write_json(Path(out), {"machine": machine(), "scans": own, "table": table, "cases": rows})
    print("| spacing, mm | template | line HU / template's | above half | trees whole | s |\n|---|---|---|---|---|---|")
    for r in table:
        print(
            f"| {r['spacing_mm']} | {r['template']} | {r['line_ratio']:.2f} | {r['above_half']:.2f} | "
            f"{r['trees_whole']} | {r['seconds']:.0f} |"
        )
    save_sheet(picture, sheet, vessel_labels=THIN)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(run)
