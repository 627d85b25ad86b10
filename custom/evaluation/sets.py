"""A synthetic data set measured against the real cases that its generator was trained on, and others."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from custom.evaluation.distances import (
    copying_p_value,
    distance_ratios,
    frechet_distance,
    kernel_distance,
    mean_shifts,
    standardised,
)
from custom.evaluation.gathering import (
    Case,
    Features,
    Labels,
    Traits,
    Volumes,
    closest,
    diversity,
    gather,
    with_templates,
)
from custom.evaluation.realism import spectrum_ratio, two_sample_auc
from custom.evaluation.records import read_records
from custom.runs.files import plain_values, write_json
from custom.runs.tracking import log_run
from custom.volumes.cases import check_files
from custom.volumes.names import case_names
from numpy.typing import NDArray
from tqdm import tqdm

logger = logging.getLogger(__name__)

__all__ = ["SET_MEASURES", "measure_set"]

SET_MEASURES = "set_metrics.json"
_SHIFTS = 10  # ours: so many features are listed
_LIMITS = ("local_correlation", "template_copy")


def _feature_measures(scaled: Sequence[NDArray], seed: int) -> dict[str, Any]:
    """Kernel and Frechet distances, and nearest neighbours among training and held-out cases."""
    synthetic, training, held_out = scaled
    sets = {"synthetic": synthetic, "training": training, "held_out": held_out}
    pairs = (("synthetic", "training"), ("synthetic", "held_out"), ("training", "held_out"))
    kernel = {f"{a}_{b}": kernel_distance(sets[a], sets[b], seed=seed) for a, b in pairs}
    try:
        frechet: dict[str, Any] = {"synthetic_training": frechet_distance(synthetic, training)}
    except ValueError as refusal:
        frechet = {"synthetic_training": None, "refused": str(refusal)}
    return {
        "kernel_distance": {name: {"value": value, "sd_of_halves": sd} for name, (value, sd) in kernel.items()},
        "frechet_distance": frechet,
        "memorisation": {
            "distance_ratio": _quantiles(distance_ratios(synthetic, training, held_out)),
            "distance_ratio_of_held_out": _quantiles(distance_ratios(held_out, training, held_out)),
            "copying_p_value": copying_p_value(synthetic, training, held_out),
        },
    }


def _realism(made: Volumes, real: Volumes, *, steps: int, seed: int) -> dict[str, Any]:
    """What tells one set from another: speckle at edges, spectrum inside labels, and a network's answer."""
    return {
        "edge_speckle_ratio": float(np.nanmean(made.speckle) / np.nanmean(real.speckle)),
        "spectrum_ratio": spectrum_ratio(made.spectra, real.spectra),
        "two_sample_auc": two_sample_auc(made.patches, real.patches, steps=steps, seed=seed),
    }


def _largest_shifts(synthetic: NDArray, real: NDArray, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Features whose mean differs most from that of the real cases, in their standard deviations."""
    shifts = mean_shifts(synthetic, real)
    names = names if names is not None else [f"feature {k}" for k in range(len(shifts))]
    if len(names) != len(shifts):
        raise ValueError(f"feature_names: one for each of the {len(shifts)} features is needed, got {len(names)}")
    order = np.argsort(-np.abs(np.nan_to_num(shifts)), kind="stable")[:_SHIFTS]
    return [{"feature": names[k], "shift_sd": float(shifts[k])} for k in order if np.isfinite(shifts[k])]


def _quantiles(values: NDArray) -> dict[str, float]:
    return {f"p{q}": float(np.nanpercentile(values, q)) for q in (5, 50, 95)}


def _case_rows(
    synthetic: Volumes, real: Volumes, records: Sequence[Case], ratios: NDArray, candidates: int
) -> list[dict[str, Any]]:
    places = {Path(image).resolve(): k for k, image in enumerate(real.images)}
    rows = []
    for i, record in enumerate(tqdm(records, desc="searched for copies", leave=False)):
        template = places[Path(record["template"]["image"]).resolve()]
        best, correlation = closest(synthetic, i, real, [template], candidates)
        rows.append(
            {
                "case": record["case"],
                "distance_ratio": float(ratios[i]),
                "most_similar": real.images[best],
                "local_correlation": correlation,
                "template_copy": record["measures"]["template_copy"],
            }
        )
    return rows


def _near_duplicates(
    rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float], names: Mapping[str, str]
) -> list[dict[str, str]]:
    """Cases that exceed a limit, each with what it exceeds; what is not known, NaN or None, exceeds nothing."""
    found = []
    for row in rows:
        other = {"local_correlation": f" with {names[row['most_similar']]}"}
        reasons = [
            f"{k}{other.get(k, '')}: {row[k]:.2f}, at most {v}"
            for k, v in limits.items()
            if row[k] is not None and row[k] > v
        ]
        if reasons:
            found.append({"case": row["case"], "reason": "; ".join(reasons)})
    return found


_MORE_CASES = {
    "synthetic": "make a larger set by `synthesizing`, or relax its `gate`",
    "training": "list more in `training_datalists`, or choose another `training_section`",
    "held_out": "list more in `held_out_datalists`, or choose other `held_out_sections`",
}
"""How a user gets more cases of a set."""


def _check(limits: Mapping[str, float], **sets: Sequence[Case]) -> None:
    if unknown := sorted(set(limits) - set(_LIMITS)):
        raise ValueError(f"limits: {unknown} do not exist; the limits are {list(_LIMITS)}")
    for name, cases in sets.items():
        if len(cases) < 2:
            raise ValueError(
                f"{name}: at least two cases are needed to measure a set, got {len(cases)}; {_MORE_CASES[name]}"
            )
        check_files([{key: case[key] for key in ("image", "label")} for case in cases], f"{name} cases")


def _numbers(measures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested dictionaries under names joined by dots."""
    found: dict[str, float] = {}
    for key, value in measures.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            found[prefix + key] = float(value)
    return found


def measure_set(
    output_dir: str,
    *,
    synthetic: Sequence[Case],
    training: Sequence[Case],
    held_out: Sequence[Case],
    read: Callable[[Case], Case],
    features: Features,
    feature_names: Sequence[str] | None,
    traits: Traits,
    num_labels: int,
    homogeneous_labels: Sequence[int],
    classifier_steps: int,
    limits: Mapping[str, float],
    max_pairs: int,
    candidates: int,
    seed: int,
    settings: Mapping[str, Any],
    tracking_uri: str | None = None,
) -> str:
    """Write `set_metrics.json` of a synthetic data set: realism, diversity, memorisation and near duplicates.

    Features of all cases are kept in memory; volumes on the common grid, 0.8 MB each, in a temporary folder.

    Args:
        output_dir: of a finished synthesis.
        synthetic: `image`, `label` and `record` (relative to `output_dir`) of its cases.
        training: `image` and `label` of what the generator was trained on; templates are added.
        held_out: the same of real cases that it never saw, two at least.
        read: `image` and `label` files -> MetaTensors `image` (1, H, W, D) HU and `label`, cropped to the heart at one
            spacing, and on a grid that all cases share `view`, the image in [0, 1], and `inside`, the label.
        features: image and label (H, W, D) -> vector, as long for every case.
        feature_names: of the vector's entries; None numbers them.
        traits: image, label and spacing in mm -> what is kept of every case for plots of the set beside real cases.
        num_labels: label ids 0 to num_labels - 1.
        homogeneous_labels: ids inside which the spectrum is measured.
        classifier_steps: of training the network that is asked to tell rendered from real patches.
        limits: of "local_correlation" and "template_copy"; above, a case is a near duplicate.
        max_pairs: so many pairs at most are compared for diversity, in the synthetic and in the training set.
        candidates: so many training cases, those that look most like a synthetic one, are searched for copies, and its
            template.
        seed: of pairs and halves.
        settings: kept in the file.
        tracking_uri: of MLflow; None leaves that out.

    Returns:
        path of the file.

    Raises:
        FileNotFoundError: naming missing files.
        ValueError: on fewer than two synthetic, training or held-out cases, an unknown limit, or features of different
            number.
    """
    labels = Labels(num_labels, homogeneous_labels)
    root, rng = Path(output_dir), np.random.default_rng(seed)
    records = read_records(root, synthetic, {"template": {"image", "label"}, "measures": {"template_copy"}})
    real_cases = with_templates(training, records)
    _check(limits, synthetic=synthetic, training=real_cases, held_out=held_out)
    with tempfile.TemporaryDirectory() as scratch:
        made, real, other = (
            gather(cases, read, features, traits, labels, seed, Path(scratch) / name)
            for name, cases in (("synthetic", synthetic), ("training", real_cases), ("held_out", held_out))
        )
        all_real = np.concatenate([real.features, other.features])
        scaled = [standardised(volumes.features, all_real) for volumes in (made, real, other)]
        rows = _case_rows(made, real, records, distance_ratios(*scaled), candidates)
        among_real = [closest(other, i, real, [], candidates)[1] for i in range(len(other))]
        measures = {
            "cases": {"synthetic": len(made), "training": len(real), "held_out": len(other)},
            **_feature_measures(scaled, seed),
            "realism": {
                "synthetic_training": _realism(made, real, steps=classifier_steps, seed=seed),
                "held_out_training": _realism(other, real, steps=classifier_steps, seed=seed),
            },
            "largest_shifts": _largest_shifts(made.features, all_real, feature_names),
            "ms_ssim": {"synthetic": diversity(made, max_pairs, rng), "training": diversity(real, max_pairs, rng)},
            "local_correlation": {
                "synthetic": _quantiles(np.array([row["local_correlation"] for row in rows])),
                "held_out": _quantiles(np.array(among_real)),
            },
            "near_duplicates": _near_duplicates(
                rows, limits, dict(zip(real.images, case_names(real.images), strict=True))
            ),
            "per_case": rows,
            "traits": {"synthetic": made.traits, "training": real.traits, "held_out": other.traits},
        }
    path = root / SET_MEASURES
    options = {**settings, "limits": limits, "max_pairs": max_pairs, "candidates": candidates, "seed": seed}
    options["classifier_steps"] = classifier_steps
    write_json(path, measures | {"settings": plain_values(options)})
    if tracking_uri:
        metrics = _numbers(measures) | {"near_duplicates": float(len(measures["near_duplicates"]))}
        log_run(tracking_uri, root, run_name="measure_set", params=options, metrics=metrics, artifacts=[path])
    logger.info("measures of %d cases, %d near duplicates: %s", len(rows), len(measures["near_duplicates"]), path)
    return str(path)
