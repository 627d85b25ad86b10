"""Tables of the report: cases, measures of the set, and how it is distributed beside real cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from custom.synthesis.page.assembling import Picture
from custom.synthesis.page.plots import distribution_picture
from custom.volumes.names import case_names

__all__ = ["case_rows", "distribution_pictures", "set_section"]

Record = Mapping[str, Any]
Traits = Mapping[str, Sequence[Mapping[str, Any]]]
"""Group -> `custom.evaluation.traits.case_traits` of each of its cases."""
_GROUPS = {
    "synthetic": "synthetic",
    "templates": "their templates",
    "training": "real, training",
    "held_out": "real, held out",
}
_OF_LABELS = {"mean_hu": ("HU", "Mean attenuation of every label"), "volume_ml": ("ml", "Volume of every label")}
_OF_CASES = {
    "noise_hu": ("noise inside the labels", "HU, robust SD"),
    "vessel_length_mm": ("length of the vessels", "mm of centre line"),
    "vessel_contrast_hu": ("contrast of the vessels", "HU over their surroundings"),
}


def case_rows(records: Sequence[Record]) -> list[list[Any]]:
    """Rows of the table of cases: name, template, score, worst label, and how vessels and texture compare with it."""
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


def set_section(measures: Mapping[str, Any]) -> dict[str, Any]:
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


def distribution_pictures(traits: Traits) -> list[Picture]:
    """Plots of the set beside real cases.

    Args:
        traits: of "synthetic", and of real cases, by group; a group without cases is left out.

    Returns:
        none where there is nothing to compare with.
    """
    groups = {_GROUPS[name]: cases for name, cases in traits.items() if cases}
    if len(groups) < 2:
        return []
    pictures = []
    for key, (unit, caption) in _OF_LABELS.items():
        labels = dict.fromkeys(label for cases in groups.values() for case in cases for label in case[key])
        panels = [
            (label, unit, {name: [case[key].get(label) for case in cases] for name, cases in groups.items()})
            for label in labels
        ]
        if panels:
            pictures.append(Picture("png", distribution_picture(panels), caption))
    panels = [
        (title, unit, {name: [case[key] for case in cases] for name, cases in groups.items()})
        for key, (title, unit) in _OF_CASES.items()
    ]
    return [*pictures, Picture("png", distribution_picture(panels), "Noise and vessels")]
