"""Do generated masks keep what was promised? Read from the files that the bundle wrote, beside three rivals.

    python -m custom.phantom make --output_dir runs/phantoms --subjects 8 --shape 96,96,96 --spacing_mm 1.5
    python benchmarks/mask_generation.py --phantoms runs/phantoms --data_dir ../shared/data

Runs `generating` for phantoms (several references), the Visible Human heart and the real CTA (one reference each),
then measures the written NIfTI. Rivals deform the same prepared references: MONAI's `Rand3DElastic` at equal mean
displacement (sigma of 8 voxels: 30 mm, as our coarse field has, would take it 34 GiB); our own fields with
nearest-neighbour reading; our own fields with signed distances of all labels, vessels included. Started again,
`generating` goes on where it was.
"""

from __future__ import annotations

import csv
import json
import logging
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from common import PICTURES, RESULTS, ROOT, machine
from custom.geometry.deformation import exponentiate, identity_coordinates, jacobian_determinant, sample
from custom.geometry.topology import betti_numbers, components_touching, contact_areas
from custom.geometry.vessels import read_tree, tree_length_mm
from custom.masks.gate import wall_thickness_mm
from custom.masks.generator import MaskGenerator
from custom.masks.motion import Motion, carry_points
from custom.masks.preparation import dice, signed_distance
from custom.masks.reference import Reference, register_neighbour
from custom.phantom.cohort import make_subject
from custom.runs.files import write_json
from custom.volumes.pictures import save_mask_sheet
from monai.bundle import ConfigParser
from monai.transforms import Rand3DElastic
from scipy import ndimage

logger = logging.getLogger(__name__)

CONFIG = ROOT / "bundles/structdiff_cardiac/configs/generate_masks.json"
VESSEL, AORTA, WALLS = 9, 6, [1, 2, 3, 4, 5, 6, 7, 8, 10]
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def parsed(**overrides: Any) -> ConfigParser:
    """The shipped config."""
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser.update({"bundle_root": str(CONFIG.parent.parent), **overrides})
    return parser


def generate(datalist: Path, output_dir: Path, count: int) -> float:
    """Run the bundle in a process of its own; seconds it took."""
    start = time.perf_counter()
    options = ["--config_file", str(CONFIG), "--bundle_root", str(CONFIG.parent.parent)]
    options += ["--reference_datalist", str(datalist), "--output_dir", str(output_dir), "--count", str(count)]
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", "generating", *options], check=True)
    return time.perf_counter() - start


def read(path: Path) -> tuple[np.ndarray, list[float]]:
    """Label map and spacing of a file, in RAS as the generator works."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).astype(np.uint8), [float(z) for z in image.header.get_zooms()]


def survives(new: np.ndarray, source: np.ndarray) -> tuple[bool, bool]:
    """Whether all labels keep their Betti numbers and the coronaries are attached; whether the coronaries do."""
    touching, total = components_touching(new == VESSEL, new == AORTA)
    vessel = betti_numbers(new == VESSEL) == betti_numbers(source == VESSEL) and touching == total > 0
    walls = all(betti_numbers(new == k) == betti_numbers(source == k) for k in WALLS)
    return vessel and walls, vessel


def near_vessels(label: np.ndarray, spacing_mm: list[float], reach_mm: float) -> np.ndarray:
    """Voxels within a distance of the coronaries."""
    return ndimage.distance_transform_edt(label != VESSEL, sampling=spacing_mm) <= reach_mm


def radius_quantiles(label: np.ndarray, spacing_mm: list[float]) -> tuple[np.ndarray, float, float]:
    """Quantiles of the radius over the centre line, its length, and the mean cross-section, of the coronaries."""
    tree = read_tree(label == VESSEL, spacing_mm)
    length = tree_length_mm(tree)
    area = float((label == VESSEL).sum() * np.prod(spacing_mm) / length)
    return np.quantile(tree.radii_mm, QUANTILES), length, area


def measure(new: np.ndarray, source: np.ndarray, spacing_mm: list[float], limits: dict[str, Any]) -> dict[str, Any]:
    """Everything that is read off the two label maps."""
    both, vessel = survives(new, source)
    radii, length, area = radius_quantiles(new, spacing_mm)
    radii_0, length_0, area_0 = radius_quantiles(source, spacing_mm)
    contacts, contacts_0 = contact_areas(new, spacing_mm), contact_areas(source, spacing_mm)
    kept = all(
        contacts.get(pair, 0) > 0
        for pair, area in contacts_0.items()
        if VESSEL not in pair and area >= limits["min_contact_mm2"]
    ) and all(
        contacts_0.get(pair, 0) > 0
        for pair, area in contacts.items()
        if VESSEL not in pair and area >= limits["min_contact_mm2"]
    )
    volumes = [float((new == k).sum() / (source == k).sum()) for k in WALLS if (source == k).any()]
    region = near_vessels(new, spacing_mm, 10) | near_vessels(source, spacing_mm, 10)
    present = [k for k in WALLS if (region & (source == k)).any()]
    return {
        "topology_kept": both,
        "coronaries_kept": vessel,
        "contacts_kept": kept,
        "volumes_in_range": limits["volume_ratio"][0] <= min(volumes) and max(volumes) <= limits["volume_ratio"][1],
        "wall_thickness_ratio": wall_thickness_mm(new == 1, spacing_mm) / wall_thickness_mm(source == 1, spacing_mm),
        "dice_chambers": float(np.mean([dice(new == k, source == k) for k in (2, 3, 4, 5)])),
        "dice_within_10_mm_of_coronaries": float(
            np.mean([dice(region & (new == k), region & (source == k)) for k in present])
        ),
        "dice_of_10_mm_tubes": dice(near_vessels(new, spacing_mm, 10), near_vessels(source, spacing_mm, 10)),
        "vessel_cross_section_ratio": area / area_0,
        "vessel_length_ratio": length / length_0,
        "radius_difference_voxels": float(np.abs(radii - radii_0).max() / max(spacing_mm)),
    }


def surface_points(source: np.ndarray) -> torch.Tensor:
    """Every 20th voxel of the heart's surface (chambers and myocardium), in voxels."""
    heart = np.isin(source, [1, 2, 3, 4, 5])
    return torch.from_numpy(np.argwhere(heart & ~ndimage.binary_erosion(heart))[::20]).float()


def displacement_mm(points: torch.Tensor, moved: torch.Tensor, spacing_mm: list[float]) -> tuple[float, float, float]:
    """Median length, mean length, and median without the mean motion, of the way of points in mm."""
    way = (moved - points) * torch.tensor(spacing_mm)
    shape = (way - way.mean(0)).norm(dim=1)
    return float(way.norm(dim=1).median()), float(way.norm(dim=1).mean()), float(shape.median())


def elastic(source: np.ndarray, spacing_mm: list[float], points: torch.Tensor, mean_mm: float, seed: int) -> np.ndarray:
    """MONAI's elastic deformation, nearest neighbour, scaled so that the surface moves by `mean_mm` on average."""
    where = identity_coordinates(source.shape)[0]

    def deform(volume: torch.Tensor, magnitude: float, mode: str) -> torch.Tensor:
        transform = Rand3DElastic((8, 8), (magnitude, magnitude), prob=1.0, padding_mode="border", mode=mode)
        return transform.set_random_state(seed)(volume).as_tensor()

    trial = 1000.0
    read_at = deform(where, trial, "bilinear")
    index = points.long().T
    way = (read_at - where)[:, index[0], index[1], index[2]].T * torch.tensor(spacing_mm)
    magnitude = trial * mean_mm / float(way.norm(dim=1).mean())
    return deform(torch.from_numpy(source).float()[None], magnitude, "nearest")[0].numpy().round().astype(np.uint8)


def rivals(
    generator: MaskGenerator, source: np.ndarray, index: int, retries: int, mean_mm: float
) -> dict[str, np.ndarray]:
    """The same reference deformed by others: (name, label map)."""
    reference = generator.reference
    velocity, _ = generator.draw_velocity((0, index), retries)
    where = identity_coordinates(source.shape) + exponentiate(velocity)
    volume = torch.from_numpy(source)[None, None]
    labels = [0, *np.unique(source)[1:]]
    distances = torch.stack(
        [torch.from_numpy(signed_distance(source == k, reference.spacing_mm)).float() for k in labels]
    )
    points = surface_points(source)
    return {
        "Rand3DElastic": elastic(source, reference.spacing_mm, points, mean_mm, index),
        "our field, nearest neighbour": sample(volume, where, mode="nearest")[0, 0].numpy(),
        "our field, signed distances": np.array(labels, np.uint8)[sample(distances[None], where)[0].argmin(0).numpy()],
    }


def prepared_reports(root: Path) -> dict[str, Any]:
    """What preparation changed, with Betti numbers read from the written file."""
    reports = {}
    for path in sorted((root / "prepared").glob("*.nii.gz")):
        label, _ = read(path)
        rows = json.loads(path.with_name(path.name.removesuffix(".nii.gz") + ".json").read_text())["labels"]
        reports[path.name] = {k: {**row, "betti_in_file": betti_numbers(label == int(k))} for k, row in rows.items()}
    return reports


def cohort(
    name: str, root: Path, structures: dict[int, Any], motion: Motion, limits: dict[str, Any], rival_cases: int
) -> dict[str, Any]:
    """Measure one run: a row for each written mask and each rival."""
    with (root / "summary.csv").open(newline="") as file:
        requested = list(csv.DictReader(file))
    rows: list[dict[str, Any]] = []
    rival_rows: dict[str, list[tuple[bool, bool]]] = {}
    generators: dict[str, MaskGenerator] = {}
    for item in json.loads((root / "datalist.json").read_text())["training"]:
        record = json.loads((root / item["record"]).read_text())
        name_of_source = Path(item["source"]).name
        source, spacing = read(root / "prepared" / name_of_source)
        new, _ = read(root / item["label"])
        row = measure(new, source, spacing, limits)
        row["retries"] = record["retries"]
        if name_of_source not in generators:
            others = [read(root / "prepared" / f"{other}.nii.gz")[0] for other in record["neighbours"]]
            neighbours = [register_neighbour(source, other, structures, spacing) for other in others]
            generators[name_of_source] = MaskGenerator(
                Reference(source, structures, spacing_mm=spacing), neighbours, motion=motion
            )
        generator, index = generators[name_of_source], record["seed"][1]
        velocity, _ = generator.draw_velocity((0, index), record["retries"])  # as it was drawn
        points = surface_points(source)
        median, mean, shape = displacement_mm(points, carry_points(points, velocity), spacing)
        row |= {"surface_displacement_mm": median, "surface_displacement_without_mean_mm": shape}
        row["det_jacobian"] = float(jacobian_determinant(exponentiate(velocity)).min())
        row["det_jacobian_as_recorded"] = abs(row["det_jacobian"] - record["min_det_jacobian"]) < 1e-4
        if len(rival_rows.get("Rand3DElastic", [])) < rival_cases:
            for rival, label in rivals(generator, source, index, record["retries"], mean).items():
                rival_rows.setdefault(rival, []).append(survives(label, source))
        rows.append(row)
        logger.info("%s %s: %s", name, item["label"], row)
    keys = list(rows[0])
    numbers = {k: [float(r[k]) for r in rows] for k in keys}
    return {
        "requested": len(requested),
        "accepted": len(rows),
        "accepted_at_once": sum(r["retries"] == 0 for r in rows),
        "measures": {
            k: {"mean": float(np.mean(v)), "sd": float(np.std(v)), "min": float(np.min(v)), "max": float(np.max(v))}
            for k, v in numbers.items()
        },
        "rivals": {
            rival: {
                "masks": len(kept),
                "topology_kept": sum(a for a, _ in kept),
                "coronaries_kept": sum(b for _, b in kept),
            }
            for rival, kept in rival_rows.items()
        },
        "prepared": prepared_reports(root),
    }


def cost(structures: dict[int, Any]) -> dict[str, float]:
    """Seconds a mask and peak memory at 128^3 on one thread, the reference being ready."""
    torch.set_num_threads(1)
    label = make_subject(0, 0, shape=(128, 128, 128), spacing_mm=1.2).label
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    generator = MaskGenerator(Reference(label, structures, spacing_mm=(1.2, 1.2, 1.2)))
    reference_s = time.perf_counter() - start
    seconds = []
    for index in range(5):
        start = time.perf_counter()
        draws = generator((1, index)).record["retries"] + 1
        seconds.append((time.perf_counter() - start) / draws)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"reference_s": reference_s, "draw_s_median": float(np.median(seconds)), "draw_s_max": max(seconds)} | {
        "peak_gib": peak,
        "peak_gib_before": before,
    }


def draw_pictures(root: Path, name: str) -> None:
    """The picture sheet of reference and new masks, for docs/."""
    files = sorted((root / "prepared").glob("*.nii.gz"))[:1] + sorted((root / "masks").glob("*.nii.gz"))[:4]
    canonical = [nib.as_closest_canonical(nib.load(f)) for f in files]
    rows = [(f.name, np.asarray(c.dataobj).astype(np.uint8)) for f, c in zip(files, canonical, strict=True)]
    save_mask_sheet(PICTURES / f"generated_masks_{name}.png", rows, vessel_labels=[VESSEL])


def main(
    phantoms: str,
    data_dir: str,
    work_dir: str = str(ROOT / "runs/mask_generation"),
    count: int = 70,
    rival_cases: int = 10,
) -> None:
    """Generate, measure, print; write benchmarks/results/mask_generation.json.

    Args:
        phantoms: folder of a phantom cohort; its training cases are the references.
        data_dir: holds `real_cta/label_derived.nii.gz` and `visible_human_heart_F/label_1mm.nii.gz`.
        work_dir: where masks are written.
        count: masks for each of the three cohorts.
        rival_cases: masks of each cohort on which the rivals are tried.
    """
    work, data = Path(work_dir), Path(data_dir).resolve()
    sources = {"visible_human": "visible_human_heart_F/label_1mm.nii.gz", "real_cta": "real_cta/label_derived.nii.gz"}
    lists = {"phantoms": Path(phantoms) / "datalist.json"}
    for name, file in sources.items():
        lists[name] = work / f"{name}.json"
        write_json(lists[name], {"training": [{"label": str(data / file)}]})
    parser = parsed(output_dir=str(work / "none"))
    structures, limits = parser.get_parsed_content("labels").structures, parser["gate"]
    motion = Motion(**parser["motion"])
    result: dict[str, Any] = {"machine": machine(), "count": count, "cost": cost(structures), "cohorts": {}}
    print(json.dumps(result["cost"], indent=1))
    for name, datalist in lists.items():
        seconds = generate(datalist, work / name, count)
        measured = cohort(name, work / name, structures, motion, limits, rival_cases)
        result["cohorts"][name] = {"seconds": seconds, **measured}
        print(name, json.dumps({k: v for k, v in result["cohorts"][name].items() if k != "prepared"}, indent=1))
        if name in sources:
            draw_pictures(work / name, name)
    write_json(RESULTS / "mask_generation.json", result)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(main)
