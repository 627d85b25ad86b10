"""Images without a template: does a mask alone give a CT that shows it, and nothing at all a cardiac CT?

    python benchmarks/modes.py --dataset_dir runs/phantoms --coarse_datalist runs/wide/datalist.json

Renders held-out masks in mode "mask_only" (a set to measure, and one mask under eight seeds) and as many empty ones in
mode "unconditional", by inference.json. Measured are kernel distance and edge speckle of the first,
with real held-out cases beside; of the second which structures the shipped segmenter finds and whether their volumes
are within the range of the cohort, and how like they are to the nearest training case, with real held-out cases beside.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fire
import matplotlib
import nibabel as nib
import numpy as np
import torch
from common import ANATOMY, PICTURES, RESULTS, ROOT, machine, trained_renderer
from custom.diffusion.coarse import CELL_MM, coarsened
from custom.runs.files import replace_file, write_json
from custom.volumes.cases import load_cases
from custom.volumes.pictures import WINDOW_HU, heart_centre, read_ras
from downstream import GENERATOR, SEGMENTER, bundle_run, once
from matplotlib.figure import Figure
from rival_evaluation import CHAMBERS, HELD_OUT, Collected, World, realism

logger = logging.getLogger(__name__)
matplotlib.use("Agg")

SEEDS, REFERENCE = 8, 30
FOUND = [1, *CHAMBERS, 6]  # myocardium, chambers, aorta
RANGE = (0.5, 2.0)  # of volume, against the smallest and largest of the cohort; ours
CORE_CELLS = 20  # voxels of 6 mm that all fields of view share


def _render(mode: str, masks: list[str], folder: Path, ckpt_dir: str, **options: Any) -> list[Path]:
    """Volumes of all masks, by inference.json, which itself no longer offers the mode "unconditional"."""
    paths = [folder / Path(mask).name for mask in masks]
    parser = trained_renderer(ckpt_dir, mode=mode, target_masks=masks, output_dir=str(folder), **options)
    if parser.get_parsed_content("data"):
        parser.get_parsed_content("evaluator").run()
    return paths


def _volumes_ml(path: Path | str) -> np.ndarray:
    """Volume of each label of a file."""
    image: Any = nib.load(path)
    ids = np.asarray(image.dataobj).round().astype(int)
    counts = np.bincount(ids.ravel(), minlength=ANATOMY.num_labels)[: ANATOMY.num_labels]
    return counts * float(np.prod(image.header.get_zooms()[:3])) / 1000


def _core(path: Path | str) -> np.ndarray:
    """The middle of a volume at 6 mm, standardised, to be correlated with others."""
    image: Any = nib.load(path)
    values = torch.from_numpy(np.asarray(image.dataobj).astype(np.float32))[None, None]
    core = coarsened(values, list(map(float, image.header.get_zooms()[:3])), [CORE_CELLS] * 3).numpy().ravel()
    return (core - core.mean()) / core.std()


def _nearest(paths: list[Any], training: np.ndarray) -> list[float]:
    """Correlation of each volume with the most similar training case."""
    return [float((training @ _core(path)).max() / training.shape[1]) for path in paths]


def _picture(rows: list[tuple[str, list[tuple[np.ndarray, tuple[int, int, int]]]]], path: str) -> None:
    """Axial above coronal slices, eight volumes a row."""
    figure = Figure(figsize=(16, 4.1 * len(rows)), layout="constrained")
    axes = figure.subplots(2 * len(rows), SEEDS)
    for k, (title, volumes) in enumerate(rows):
        axes[2 * k, 0].set_title(title, fontsize=10, loc="left")
        for column, (image, (_, y, z)) in enumerate(volumes):
            for row, plane in enumerate((image[:, :, z], image[:, y, :])):
                shown = np.flip(np.rot90(plane), 1)
                axes[2 * k + row, column].imshow(shown, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
    for axis in axes.flat:
        axis.set_axis_off()
    replace_file(Path(path), lambda part: figure.savefig(part, format="png", dpi=75))


def run(
    dataset_dir: str,
    coarse_datalist: str,
    ckpt_dir: str = str(GENERATOR / "models"),
    work_dir: str = str(ROOT / "runs/modes"),
    masks: int = 12,
    unconditional: int = 16,
    sample_strength: float = 0.0,
    auc: bool = False,
    out: str = str(RESULTS / "modes.json"),
    picture: str = str(PICTURES / "modes.png"),
) -> None:
    """Render and measure; print both tables, write JSON and a picture.

    Args:
        dataset_dir: phantoms with "training" and held-out sections.
        coarse_datalist: of the cases that the coarse stage was trained on.
        ckpt_dir: with model.pt and coarse.pt.
        work_dir: of what is rendered, which is kept.
        masks, unconditional: how many of each.
        sample_strength: as in inference.json.
        auc: whether to train the networks of the two-sample test as well.
        out, picture: files to write.
    """
    work, world = Path(work_dir), World(dataset_dir, Path(work_dir) / "targets")
    strength = {"sample_strength": sample_strength}
    held_out = [case["label"] for case in load_cases(world.datalist, HELD_OUT)]
    real, unseen, made = (Collected(world.spacing_mm) for _ in range(3))
    for section, count, into in (("training", REFERENCE, real), (HELD_OUT, masks, unseen)):
        for image, label in world.volumes(section, count):
            into.add(image, label)
    paths = _render("mask_only", held_out[:masks], work / "mask_only", ckpt_dir, **strength)
    means = []
    for path, mask in zip(paths, held_out, strict=False):
        image, label = read_ras(path), read_ras(mask).round().astype(np.int64)
        made.add(image, label)
        means.append([float(image[label == k].mean()) if (label == k).any() else np.nan for k in ANATOMY.foreground])
    scale = np.array([*real.features, *unseen.features])
    table = {"real": realism(unseen, real, scale, auc=auc), "mask_only": realism(made, real, scale, auc=auc)}
    limits = ANATOMY.plausible_hu
    inside = [
        all(low <= row[k - 1] <= high for k, (low, high) in limits.items() if np.isfinite(row[k - 1])) for row in means
    ]
    table["mask_only"] |= {"plausible": float(np.mean(inside)), "label_sd_hu": np.nanstd(means, 0).tolist()}

    seeds = [
        _render("mask_only", held_out[:1], work / f"seed_{s}", ckpt_dir, seed=s, **strength)[0] for s in range(SEEDS)
    ]
    drawn = _render("unconditional", held_out[:unconditional], work / "unconditional", ckpt_dir, **strength)
    images = {"images": str([str(path) for path in drawn]), "output_dir": work / "segmented"}
    segmented = [work / "segmented" / path.name.replace(".nii.gz", "_seg.nii.gz") for path in drawn]
    once(segmented[-1], lambda: bundle_run("run", SEGMENTER, ["inference.json"], **images))
    usual = np.array([_volumes_ml(case["label"]) for case in load_cases(world.datalist, "training")])
    low, high = RANGE[0] * usual.min(0), RANGE[1] * usual.max(0)
    found = [{k: bool(low[k] <= volumes[k] <= high[k]) for k in FOUND} for volumes in map(_volumes_ml, segmented)]
    training = np.array([_core(case["image"]) for case in load_cases(coarse_datalist, "training")])
    others = [case["image"] for case in load_cases(world.datalist, HELD_OUT)[:unconditional]]
    nearest, nearest_real = _nearest(drawn, training), _nearest(others, training)
    cores = np.array([_core(path) for path in drawn])
    alike = (cores @ cores.T / cores.shape[1])[np.triu_indices(len(cores), 1)]
    table["unconditional"] = {
        "recognised": sum(all(row.values()) for row in found),
        "of": len(found),
        "nearest_training_case": max(nearest),
        "nearest_training_case_of_real": max(nearest_real),
        "alike_mean": float(alike.mean()),
        "alike_max": float(alike.max()),
    }
    label = read_ras(held_out[0]).round().astype(np.int64)
    centre = heart_centre(label)
    rows = [("one mask, eight seeds", [(read_ras(path), centre) for path in seeds])]
    for start in range(0, len(drawn), SEEDS):
        volumes = [read_ras(path) for path in drawn[start : start + SEEDS]]
        rows.append(("unconditional", [(v, tuple(n // 2 for n in v.shape)) for v in volumes]))  # type: ignore[misc]
    _picture(rows, picture)
    settings = {"masks": masks, "unconditional": unconditional, **strength, "range": RANGE, "cell_mm": CELL_MM}
    write_json(Path(out), {"machine": machine(), **settings, "table": table, "found": found})
    for name, row in table.items():
        print(name, {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(run)
