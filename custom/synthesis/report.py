"""One self-contained HTML page about a synthetic data set."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from custom.evaluation.comparison import COUNTS, label_table, paired_table, read_evaluations
from custom.evaluation.records import read_set
from custom.evaluation.sets import SET_MEASURES
from custom.runs.files import read_json, replace_file
from custom.runs.tracking import log_run
from custom.volumes.names import case_names
from custom.volumes.pictures import case_png, histogram_png, ranges_png, read_ras, upright
from custom.volumes.reading import read_labels
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

__all__ = ["write_report"]

_VOXELS = 100_000  # ours: of a label over all cases; their percentiles are known to a fraction of a HU
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

Record = Mapping[str, Any]
Values = dict[str, list[NDArray]]
"""Label -> HU of voxels drawn from each case."""


def _picture(png: bytes, caption: str) -> dict[str, str]:
    return {"png": base64.b64encode(png).decode(), "caption": caption}


def _add_values(
    values: Values, image: NDArray, label: NDArray, names: Sequence[str], voxels: int, rng: np.random.Generator
) -> None:
    for k, name in enumerate(names[1:], 1):
        inside = image[label == k]
        if len(inside):
            values.setdefault(name, []).append(rng.choice(inside, min(len(inside), voxels), replace=False))


def _shown(kept: Sequence[Record], rejected: Sequence[Record], max_cases: int) -> set[str]:
    """Cases to picture: of those kept the best and the worst (they are sorted by score), and of rejected ones."""
    worst = kept[max(len(kept) - (max_cases - max_cases // 2), 0) :]
    best = {record["case"] for record in kept[: max_cases // 2]} | {record["case"] for record in worst}
    return best | {record["case"] for record in rejected[: 2 * max_cases - len(best)]}


def _read_volumes(
    root: Path,
    kept: Sequence[Record],
    rejected: Sequence[Record],
    *,
    names: Sequence[str],
    vessel_labels: Sequence[int],
    shown: set[str],
    provenance: Mapping[str, Any],
) -> tuple[dict[str, dict[str, str]], dict[str, Values]]:
    """Pictures of the cases that are shown, and HU of the labels, synthetic and real."""
    rng = np.random.default_rng(0)
    groups: dict[str, Values] = {"synthetic": {}, "real templates": {}}
    pictures: dict[str, dict[str, str]] = {}
    for record in [*kept, *rejected]:
        image, label, trust = (read_ras(root / record["paths"][key]) for key in ("image", "label", "confidence"))
        if not record["rejected"]:
            _add_values(groups["synthetic"], image, label, names, _VOXELS // len(kept), rng)
        if record["case"] in shown:
            caption = f"{record['case']}, score {record['score_hu']:.1f} HU"
            pictures[record["case"]] = _picture(case_png(image, label, trust, vessel_labels=vessel_labels), caption)
    templates = {(r["template"]["image"], r["template"]["label"]): r["template"] for r in [*kept, *rejected]}
    label_mapping = provenance.get("label_mapping", {"from": [], "to": []})  # which older sets lack
    for (image_file, _), template in sorted(templates.items()):
        image, label = read_ras(image_file), upright(read_labels(template, label_mapping))
        _add_values(groups["real templates"], image, label, names, _VOXELS // len(templates), rng)
    return pictures, groups


def _case_rows(records: Sequence[Record]) -> list[list[Any]]:
    rows = []
    templates = case_names([record["template"]["image"] for record in records])
    for record, template in zip(records, templates, strict=True):
        measures = record["measures"]
        errors = [abs(v) for v in measures["label_error_hu"].values()]
        rows.append(
            [
                record["case"],
                template,
                float(record["score_hu"]),
                float(max(errors, default=float("nan"))),
                *(measures[k] for k in ("vessel_contrast", "vessel_continuity", "template_copy")),
            ]
        )
    return rows


def _realism_rows(realism: Mapping[str, Any] | None) -> list[list[Any]]:
    """How far the set, and held-out cases in its place, can be told from training cases; sets before 0.4 lack it."""
    if realism is None:
        return []
    both = [realism["synthetic_training"], realism["held_out_training"]]
    farthest = [
        max((r for r in part["spectrum_ratio"] if r is not None), key=lambda ratio: abs(ratio - 1), default=None)
        for part in both
    ]
    return [
        ["speckle at edges, ratio to training cases", *(part["edge_speckle_ratio"] for part in both)],
        ["spectrum inside labels, ratio to training cases, farthest band", *farthest],
        [
            "AUC of a network that tells patches from those of training cases",
            *(p["two_sample_auc"]["mean"] for p in both),
        ],
    ]


def _set_section(measures: Mapping[str, Any]) -> dict[str, Any]:
    """What `custom.evaluation.sets.measure_set` wrote, as tables."""
    kernel, ratios, ssim = (measures[key] for key in ("kernel_distance", "memorisation", "ms_ssim"))
    correlation, real = measures["local_correlation"], kernel["training_held_out"]["value"]
    medians = [ratios[key]["p50"] for key in ("distance_ratio", "distance_ratio_of_held_out")]
    rows = [
        ["kernel distance to training cases", kernel["synthetic_training"]["value"], real],
        ["kernel distance to held-out cases", kernel["synthetic_held_out"]["value"], real],
        ["MS-SSIM of pairs", ssim["synthetic"]["mean"], ssim["training"]["mean"]],
        ["distance to training over held-out cases, median", *medians],
        [
            "local correlation with training cases, 95 %",
            correlation["synthetic"]["p95"],
            correlation["held_out"]["p95"],
        ],
        *_realism_rows(measures.get("realism")),
    ]
    return {
        "counts": measures["cases"],
        "rows": rows,
        "shifts": [[row["feature"], row["shift_sd"]] for row in measures["largest_shifts"]],
        "copies": [[row["case"], row["reason"]] for row in measures["near_duplicates"]],
    }


def _segmenter_section(evaluations: Mapping[str, str], vessel_names: Sequence[str]) -> dict[str, Any]:
    """What segmenters reach on test cases, and their pictures of the first of these."""
    read = read_evaluations(evaluations)
    counts = [metric for metric in COUNTS if all(metric in table for table in read.values())]  # not before version 0.4
    measures: list[tuple[str, str | None]] = [("dice", None), *((metric, None) for metric in counts)]
    measures += [(metric, name) for name in vessel_names for metric in ("dice", "cl_dice", "hd95_mm", "betti_error_0")]
    first = min(next(iter(read.values())).index.unique("case"))
    pictures = {name: Path(folder) / "pictures" / f"{first}.png" for name, folder in evaluations.items()}
    return {
        "paired": paired_table(read, measures),
        "dice": label_table(read, "dice"),
        "counts": [(metric, *label_table(read, metric)) for metric in counts],
        "pictures": [
            _picture(path.read_bytes(), f"{name}: {first}") for name, path in pictures.items() if path.exists()
        ],
    }


def write_report(
    output_dir: str,
    *,
    label_names: Sequence[str],
    vessel_labels: Sequence[int],
    max_cases: int = 12,
    evaluations: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
) -> str:
    """Write `report.html`: cohort table, scores, HU against the real cases, pictures, rejected cases, provenance.

    Also the measures of the set and segmenters beside each other, where there are any.

    Everything is in the one file; it needs no network and no other file.

    Args:
        output_dir: of a finished synthesis, with `datalist.json` and `records/`.
        label_names: one for each id, background first.
        vessel_labels: ids of the projections.
        max_cases: so many cases are pictured, those of the highest and lowest scores among them; rejected ones apart.
        evaluations: name -> output folder of `evaluate.json` of the segmenter; others are compared with the first.
        tracking_uri: of MLflow, where the report is logged; None leaves that out.

    Returns:
        path of the page.

    Raises:
        FileNotFoundError, ValueError: of :func:`custom.evaluation.records.read_set`.
    """
    root = Path(output_dir)
    kept, rejected, provenance = read_set(output_dir)
    pictures, groups = _read_volumes(
        root,
        kept,
        rejected,
        names=label_names,
        vessel_labels=vessel_labels,
        shown=_shown(kept, rejected, max_cases),
        provenance=provenance,
    )
    hu = {group: {name: np.concatenate(parts) for name, parts in values.items()} for group, values in groups.items()}
    scores = [record["score_hu"] for record in [*kept, *rejected]]
    measured = root / SET_MEASURES
    page = _TEMPLATES.get_template("report.html").render(
        kept=len(kept),
        rejected=len(rejected),
        cases=_case_rows(kept),
        scores=_picture(histogram_png(scores, name="score, HU"), "Scores of all cases, those kept apart included"),
        intensities=_picture(ranges_png(hu, name="HU"), "Median and 5 to 95 % of the voxels of each label"),
        of_set=_set_section(read_json(measured, "run `measuring` again")) if measured.exists() else None,
        segmenters=_segmenter_section(evaluations, [label_names[k] for k in vessel_labels]) if evaluations else None,
        pictures=[pictures[r["case"]] for r in kept if r["case"] in pictures],
        reasons=[[r["case"], "; ".join(r["rejected"])] for r in rejected],
        rejected_pictures=[pictures[r["case"]] for r in rejected if r["case"] in pictures],
        provenance=json.dumps(provenance, indent=1),
    )
    path = root / "report.html"
    replace_file(path, lambda part: part.write_text(page + "\n", encoding="utf-8"))
    if tracking_uri:
        log_run(
            tracking_uri,
            root,
            run_name="synthesize",
            params={"config_hash": provenance.get("config_hash")},
            metrics={"accepted": len(kept), "rejected": len(rejected), "mean_score_hu": float(np.mean(scores))},
            artifacts=[path],
        )
    logger.info("report of %d cases: %s", len(kept) + len(rejected), path)
    return str(path)
