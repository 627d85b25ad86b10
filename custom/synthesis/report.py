"""One self-contained HTML page about a synthetic data set."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation
from numpy.typing import NDArray

from custom.evaluation.comparison import label_table, paired_table, read_evaluations
from custom.evaluation.sets import SET_MEASURES
from custom.runs.files import replace_file
from custom.runs.tracking import log_run
from custom.volumes.pictures import case_png, histogram_png, ranges_png

logger = logging.getLogger(__name__)

__all__ = ["write_report"]

_VOXELS = 100_000  # a label in the distributions, over all cases
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .reason { color: #a00; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def _picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="n">{"" if np.isnan(value) else f"{value:.2f}"}</td>'
        return f"<td>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class _Reader:
    """Volumes in RAS, as arrays."""

    def __init__(self) -> None:
        self.read = Compose([LoadImage(), EnsureChannelFirst(), Orientation(axcodes="RAS", labels=None)])

    def __call__(self, path: str | Path) -> NDArray[np.float32]:
        return self.read(str(path))[0].numpy()


def _add_values(
    groups: dict[str, list[NDArray]],
    image: NDArray,
    label: NDArray,
    names: Sequence[str],
    voxels: int,
    rng: np.random.Generator,
) -> None:
    for k, name in enumerate(names[1:], 1):
        values = image[label == k]
        if len(values):
            groups.setdefault(name, []).append(rng.choice(values, min(len(values), voxels), replace=False))


def _case_rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    rows = []
    for record in records:
        measures = record["measures"]
        errors = [abs(v) for v in measures["label_error_hu"].values()]
        rows.append(
            [
                record["case"],
                Path(record["template"]["image"]).name,
                float(record["score_hu"]),
                float(max(errors, default=float("nan"))),
                *(float(measures[k]) for k in ("vessel_contrast", "vessel_continuity", "template_copy")),
            ]
        )
    return rows


def _set_section(measures: Mapping[str, Any]) -> list[str]:
    """What `custom.evaluation.sets.measure_set` wrote, as tables."""
    kernel, ratios, ssim = (measures[key] for key in ("kernel_distance", "memorisation", "ms_ssim"))
    correlation = measures["local_correlation"]
    rows = [
        [
            "kernel distance to training cases",
            kernel["synthetic_training"]["value"],
            kernel["training_held_out"]["value"],
        ],
        [
            "kernel distance to held-out cases",
            kernel["synthetic_held_out"]["value"],
            kernel["training_held_out"]["value"],
        ],
        ["MS-SSIM of pairs", ssim["synthetic"]["mean"], ssim["training"]["mean"]],
        [
            "distance to training over held-out cases, median",
            ratios["distance_ratio"]["p50"],
            ratios["distance_ratio_of_held_out"]["p50"],
        ],
        [
            "local correlation with training cases, 95 %",
            correlation["synthetic"]["p95"],
            correlation["held_out"]["p95"],
        ],
    ]
    counts = measures["cases"]
    copies = [[row["case"], row["reason"]] for row in measures["near_duplicates"]]
    return [
        "<h2>The set</h2>",
        f"<p>{counts['synthetic']} accepted cases against {counts['training']} training and {counts['held_out']} "
        "held-out real cases. Kernel distances of one distribution are about 0. The lower MS-SSIM is, the more pairs "
        "differ. A ratio far below that of held-out cases, or a correlation far above, means copies.</p>",
        _table(["measure", "synthetic", "real to real"], rows),
        "<p>Features whose mean differs most from real cases, in standard deviations of these:</p>",
        _table(["feature", "shift"], [[row["feature"], row["shift_sd"]] for row in measures["largest_shifts"]]),
        "<h2>Near duplicates</h2>",
        _table(["case", "limits exceeded"], copies) if copies else "<p>None.</p>",
    ]


def _segmenter_section(evaluations: Mapping[str, str], vessel_names: Sequence[str]) -> list[str]:
    """What segmenters reach on test cases, and their pictures of the first of these."""
    read = read_evaluations(evaluations)
    measures: list[tuple[str, str | None]] = [("dice", None)]
    measures += [(metric, name) for name in vessel_names for metric in ("dice", "cl_dice", "hd95_mm", "betti_error_0")]
    first = min(case for case, _ in next(iter(read.values())))
    pictures = {name: Path(folder) / "pictures" / f"{first}.png" for name, folder in evaluations.items()}
    return [
        "<h2>Segmenters</h2>",
        "<p>On real cases that neither segmenter was trained on; differences are paired by case.</p>",
        _table(*paired_table(read, measures)),
        "<p>Dice of every label, mean over cases:</p>",
        _table(*label_table(read, "dice")),
        *(_picture(path.read_bytes(), f"{name}: {first}") for name, path in pictures.items() if path.exists()),
    ]


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
        FileNotFoundError: when there is no finished synthesis.
        ValueError: when it has no case.
    """
    root = Path(output_dir)
    listing = root / "datalist.json"
    if not listing.exists():
        raise FileNotFoundError(f"{listing}: no synthetic data set; run synthesize.json first")
    content = json.loads(listing.read_text())
    kept, rejected = (
        [json.loads((root / item["record"]).read_text()) for item in content[section]]
        for section in ("training", "rejected")
    )
    if not kept + rejected:
        raise ValueError(f"{listing}: the data set is empty; there is nothing to report")
    read, rng = _Reader(), np.random.default_rng(0)
    groups: dict[str, dict[str, list[NDArray]]] = {"synthetic": {}, "real templates": {}}
    pictures: dict[str, str] = {}
    kept.sort(key=lambda record: record["score_hu"])
    worst = kept[max(len(kept) - (max_cases - max_cases // 2), 0) :]
    shown = {record["case"] for record in kept[: max_cases // 2] + worst}
    for record in [*kept, *rejected]:
        image, label, trust = (read(root / record["paths"][key]) for key in ("image", "label", "confidence"))
        if not record["rejected"]:
            _add_values(groups["synthetic"], image, label, label_names, _VOXELS // len(kept), rng)
        if record["case"] in shown or (record["rejected"] and len(pictures) < 2 * max_cases):
            caption = f"{record['case']}, score {record['score_hu']:.1f} HU"
            pictures[record["case"]] = _picture(case_png(image, label, trust, vessel_labels=vessel_labels), caption)
    templates = {(r["template"]["image"], r["template"]["label"]) for r in [*kept, *rejected]}
    for image_file, label_file in sorted(templates):
        _add_values(
            groups["real templates"], read(image_file), read(label_file), label_names, _VOXELS // len(templates), rng
        )
    measured = root / SET_MEASURES
    of_set = _set_section(json.loads(measured.read_text())) if measured.exists() else []
    of_set += _segmenter_section(evaluations, [label_names[k] for k in vessel_labels]) if evaluations else []
    page = _page(content, kept, rejected, pictures, groups, of_set)
    path = root / "report.html"
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8"))
    if tracking_uri:
        scores = [record["score_hu"] for record in [*kept, *rejected]]
        log_run(
            tracking_uri,
            root,
            run_name="synthesize",
            params={"config_hash": content["provenance"].get("config_hash")},
            metrics={"accepted": len(kept), "rejected": len(rejected), "mean_score_hu": float(np.mean(scores))},
            artifacts=[path],
        )
    logger.info("report of %d cases: %s", len(kept) + len(rejected), path)
    return str(path)


def _page(
    content: Mapping[str, Any],
    kept: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, str],
    groups: Mapping[str, Mapping[str, list[NDArray]]],
    of_set: Sequence[str],
) -> str:
    scores = [r["score_hu"] for r in [*kept, *rejected]]
    joined = {g: {name: np.concatenate(v) for name, v in values.items()} for g, values in groups.items()}
    columns = [
        "case",
        "template",
        "score HU",
        "worst label HU",
        "vessel contrast",
        "vessel continuity",
        "copied texture",
    ]
    reasons = [[r["case"], "; ".join(r["rejected"])] for r in rejected]
    parts = [
        "<h1>Synthetic cardiac CT</h1>",
        f"<p>{len(kept)} cases accepted, {len(rejected)} kept apart. Every image is generated. "
        "<strong>For research on training data only, not for clinical use.</strong></p>",
        "<h2>Cases</h2>",
        "<p>Score: mean over labels of the expected error in HU, lower is better. Contrast and copied texture: as a "
        "share of the template's, and correlation with it.</p>",
        _table(columns, _case_rows(kept)),
        "<h2>Scores</h2>",
        _picture(histogram_png(scores, name="score, HU"), "Scores of all cases, those kept apart included"),
        "<h2>Intensities</h2>",
        _picture(ranges_png(joined, name="HU"), "Median and 5 to 95 % of the voxels of each label"),
        *of_set,
        "<h2>Pictures</h2>",
        "<p>Above: slices through the centre of the heart with the outlines of the mask, and a projection of the image "
        "around the coronaries. Below: the less confident, the redder; and the coronaries of the mask.</p>",
        *(pictures[r["case"]] for r in kept if r["case"] in pictures),
        "<h2>Kept apart</h2>",
        _table(["case", "limits broken"], reasons) if rejected else "<p>None.</p>",
        *(pictures[r["case"]] for r in rejected if r["case"] in pictures),
        "<h2>Provenance</h2>",
        f"<pre>{escape(json.dumps(content['provenance'], indent=1))}</pre>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Synthetic cardiac CT</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
