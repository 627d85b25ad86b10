"""Do the measures of a set tell new volumes from copies?

    python benchmarks/set_metrics.py --dataset_dir runs/phantoms --synthetic_dir runs/synthetic --work_dir runs/sets

Measured by `measure_set.json` against the training cases of the datalist and its validation cases, which nobody used:
the synthetic set; the test cases, new scans by construction; and copies of training cases with noise of 20 and of 60
HU added, as a generator that remembers would make them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import RESULTS, TRAIN_CONFIG, machine
from custom.evaluation.realism import BANDS
from custom.evaluation.rendering import texture_correlation
from custom.runs.files import write_json
from custom.volumes.cases import load_cases
from monai.bundle import ConfigParser

CONFIGS = TRAIN_CONFIG.parent


def plant(cases: list[dict[str, Any]], templates: list[dict[str, Any]], folder: Path, noise_hu: float) -> Path:
    """Write cases with noise as a synthesis would have made them from as many templates on their grid."""
    rng, items = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for case, template in zip(cases, templates, strict=True):
        image, origin = (nib.load(c["image"]) for c in (case, template))
        values, template_values = (np.asarray(i.dataobj).astype(np.float32) for i in (image, origin))
        values += rng.normal(0, noise_hu, values.shape).astype(np.float32)
        paths = {"image": f"images/{case['case']}.nii.gz", "record": f"records/{case['case']}.json"}
        nib.save(nib.Nifti1Image(values.round().astype(np.int16), image.affine), folder / paths["image"])
        heart = np.asarray(nib.load(case["label"]).dataobj) > 0
        record = {
            "case": case["case"],
            "template": {"image": template["image"], "label": template["label"]},
            "measures": {"template_copy": texture_correlation(values, template_values, heart)},
        }
        write_json(folder / paths["record"], record)
        items.append({**paths, "label": case["label"]})
    write_json(folder / "datalist.json", {"training": items})
    return folder


def measure(folder: Path, datalist: str, training: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the config on one set."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("inference.json", "synthesize.json", "measure_set.json")])
    parser.update({"template_datalist": datalist, "output_dir": str(folder), "held_out_sections": ["validation"]})
    parser.update({"measures#training": training, "measures#tracking_uri": None})
    content = json.loads(Path(parser.get_parsed_content("measures")).read_text())
    del content["per_case"]
    return content


def figures(measures: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Figures of a set, each beside the same of real cases."""
    kernel, copied = measures["kernel_distance"], measures["memorisation"]
    ssim, correlation = measures["ms_ssim"], measures["local_correlation"]
    made, floor = (measures["realism"][f"{name}_training"] for name in ("synthetic", "held_out"))
    return [
        ("edge speckle ratio", made["edge_speckle_ratio"], floor["edge_speckle_ratio"]),
        *(
            (f"spectrum ratio {low} to {high}", *ratios)
            for low, high, *ratios in zip(
                BANDS, BANDS[1:], made["spectrum_ratio"], floor["spectrum_ratio"], strict=False
            )
        ),
        ("two-sample AUC", made["two_sample_auc"]["mean"], floor["two_sample_auc"]["mean"]),
        ("kernel distance", kernel["synthetic_training"]["value"], kernel["training_held_out"]["value"]),
        ("MS-SSIM", ssim["synthetic"]["mean"], ssim["training"]["mean"]),
        ("distance ratio", copied["distance_ratio"]["p50"], copied["distance_ratio_of_held_out"]["p50"]),
        ("p value of copying", copied["copying_p_value"], float("nan")),
        ("local correlation", correlation["synthetic"]["p50"], correlation["held_out"]["p50"]),
        ("the same, 95 %", correlation["synthetic"]["p95"], correlation["held_out"]["p95"]),
    ]


def main(dataset_dir: str, synthetic_dir: str, work_dir: str, copies: int = 10) -> None:
    """Measure the sets; print a table and write benchmarks/results/set_metrics.json."""
    datalist, work = str(Path(dataset_dir) / "datalist.json"), Path(work_dir)
    training, unseen = (load_cases(datalist, section) for section in ("training", "test"))
    some = training[:copies]
    folders = {
        "synthetic": Path(synthetic_dir),
        "unseen test cases": plant(unseen, training[: len(unseen)], work / "unseen", 0.0),
        "copies + 20 HU": plant(some, some, work / "copies_20", 20.0),
        "copies + 60 HU": plant(some, some, work / "copies_60", 60.0),
    }
    results = {name: measure(folder, datalist, training) for name, folder in folders.items()}
    for name, r in results.items():
        print(f"{name}, {r['cases']['synthetic']} cases, {len(r['near_duplicates'])} near duplicates; the real cases:")
        for key, own, real in figures(r):
            print(f"    {key:26s} {own:10.3g} {real:10.3g}")
    write_json(RESULTS / "set_metrics.json", {"machine": machine(), "sets": results})


if __name__ == "__main__":
    fire.Fire(main)
