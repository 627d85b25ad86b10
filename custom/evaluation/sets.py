"""A synthetic data set measured against the real cases that its generator was trained on, and others."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom.evaluation.distances import (
    copying_p_value,
    distance_ratios,
    frechet_distance,
    kernel_distance,
    local_correlation,
    mean_shifts,
    ms_ssim,
    standardised,
)
from custom.evaluation.realism import draw_patches, edge_speckle, interior_spectrum, spectrum_ratio, two_sample_auc
from custom.evaluation.records import read_records
from custom.runs.files import plain_values, write_json
from custom.runs.tracking import log_run
from custom.volumes.cases import check_files
from custom.volumes.grids import spacing_of
from custom.volumes.names import case_names
from custom.volumes.numbering import mapped_key
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

logger = logging.getLogger(__name__)

__all__ = ["SET_MEASURES", "measure_set"]

SET_MEASURES = "set_metrics.json"
Case = Mapping[str, Any]
Features = Callable[[NDArray, NDArray], NDArray]
Traits = Callable[[NDArray, NDArray, Sequence[float]], dict[str, Any]]
_THUMBNAIL = 16  # voxels a side, ours: shows pose and habitus, which is enough to choose whom to compare
_SHIFTS = 10  # ours: so many features are listed
_PATCHES = 24  # of a case, ours: some two for each label
_LIMITS = ("local_correlation", "template_copy")


@dataclass(frozen=True)
class _Labels:
    """What realism needs to know of the label map."""

    number: int
    homogeneous: Sequence[int]


@dataclass
class _Volumes:
    """A set of cases: what is small in memory, what is large in files."""

    images: list[str]
    features: NDArray[np.float64]
    thumbnails: NDArray[np.float64]
    speckle: NDArray[np.float64]
    spectra: NDArray[np.float64]
    patches: list[torch.Tensor]
    traits: list[dict[str, Any]]
    folder: Path

    def __len__(self) -> int:
        return len(self.images)

    def view(self, index: int) -> tuple[NDArray, NDArray]:
        """Image in [0, 1] and heart of a case on the common grid."""
        content = np.load(self.folder / f"{index}.npz")
        return content["view"].astype(np.float32), content["heart"]

    def nearest(self, thumbnail: NDArray, count: int) -> list[int]:
        """Cases that look most like a thumbnail, best first."""
        return np.argsort(-self.thumbnails @ thumbnail, kind="stable")[:count].tolist()


def _gather(
    cases: Sequence[Case],
    read: Callable[[Case], Case],
    features: Features,
    traits: Traits,
    labels: _Labels,
    seed: int,
    folder: Path,
) -> _Volumes:
    folder.mkdir()
    vectors, thumbnails = [], []
    speckle, spectra, patches, measured = [], [], [], []
    for index, case in enumerate(tqdm(cases, desc=f"{folder.name} cases read", leave=False)):
        item = read({key: case[key] for key in ("image", "label", mapped_key("label")) if key in case})
        image, label, view, inside = (np.asarray(item[k])[0] for k in ("image", "label", "view", "inside"))
        ids = label.round().astype(np.int64)
        vectors.append(np.asarray(features(image, ids), dtype=np.float64).ravel())
        measured.append(traits(image, ids, spacing_of(item["image"])))
        speckle.append(edge_speckle(image, ids))
        spectra.append(interior_spectrum(image, ids, labels.homogeneous))
        patches.append(draw_patches(image, ids, count=_PATCHES, num_labels=labels.number, seed=seed + index))
        if len(vectors[-1]) != len(vectors[0]):
            raise ValueError(
                f"features: all cases must give equally many, got {len(vectors[0])}, and {len(vectors[-1])} of "
                f"{case['image']}"
            )
        small = F.adaptive_avg_pool3d(torch.as_tensor(view)[None], _THUMBNAIL).numpy().ravel().astype(np.float64)
        thumbnails.append((small - small.mean()) / max(np.linalg.norm(small - small.mean()), 1e-9))
        np.savez(folder / str(index), view=view.astype(np.float16), heart=inside > 0)
    images = [str(case["image"]) for case in cases]
    tables = [np.array(values) for values in (vectors, thumbnails, speckle, spectra)]
    return _Volumes(images, tables[0], tables[1], tables[2], tables[3], patches, measured, folder)


def _with_templates(training: Sequence[Case], records: Sequence[Case]) -> list[Case]:
    """Training cases, and the templates of the records that are not among them."""
    known = {Path(case["image"]).resolve() for case in training}
    more = {record["template"]["image"]: record["template"] for record in records}
    return [*training, *(template for image, template in more.items() if Path(image).resolve() not in known)]


def _diversity(volumes: _Volumes, max_pairs: int, rng: np.random.Generator) -> dict[str, float]:
    """MS-SSIM of pairs of one set: of all, or of as many as allowed, drawn at random."""
    pairs = np.stack(np.triu_indices(len(volumes), 1), 1)
    chosen = np.sort(rng.permutation(len(pairs))[:max_pairs])
    values = [ms_ssim(volumes.view(i)[0], volumes.view(j)[0]) for i, j in tqdm(pairs[chosen], "pairs", leave=False)]
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values)),
        "highest": max(values),
        "pairs": len(values),
        "of": len(pairs),
    }


def _closest(volumes: _Volumes, index: int, others: _Volumes, also: Sequence[int], count: int) -> tuple[int, float]:
    """Which of the others correlates most with a case window by window, and how much; the likeliest are compared."""
    image, heart = volumes.view(index)
    candidates = dict.fromkeys([*also, *others.nearest(volumes.thumbnails[index], count)])
    values = {k: local_correlation(image, others.view(k)[0], heart) for k in candidates}
    best = max(values, key=lambda k: values[k])
    return best, values[best]


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


def _realism(made: _Volumes, real: _Volumes, *, steps: int, seed: int) -> dict[str, Any]:
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
    synthetic: _Volumes, real: _Volumes, records: Sequence[Case], ratios: NDArray, candidates: int
) -> list[dict[str, Any]]:
    places = {Path(image).resolve(): k for k, image in enumerate(real.images)}
    rows = []
    for i, record in enumerate(tqdm(records, desc="searched for copies", leave=False)):
        template = places[Path(record["template"]["image"]).resolve()]
        best, correlation = _closest(synthetic, i, real, [template], candidates)
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
    labels = _Labels(num_labels, homogeneous_labels)
    root, rng = Path(output_dir), np.random.default_rng(seed)
    records = read_records(root, synthetic, {"template": {"image", "label"}, "measures": {"template_copy"}})
    real_cases = _with_templates(training, records)
    _check(limits, synthetic=synthetic, training=real_cases, held_out=held_out)
    with tempfile.TemporaryDirectory() as scratch:
        made, real, other = (
            _gather(cases, read, features, traits, labels, seed, Path(scratch) / name)
            for name, cases in (("synthetic", synthetic), ("training", real_cases), ("held_out", held_out))
        )
        all_real = np.concatenate([real.features, other.features])
        scaled = [standardised(volumes.features, all_real) for volumes in (made, real, other)]
        rows = _case_rows(made, real, records, distance_ratios(*scaled), candidates)
        among_real = [_closest(other, i, real, [], candidates)[1] for i in range(len(other))]
        measures = {
            "cases": {"synthetic": len(made), "training": len(real), "held_out": len(other)},
            **_feature_measures(scaled, seed),
            "realism": {
                "synthetic_training": _realism(made, real, steps=classifier_steps, seed=seed),
                "held_out_training": _realism(other, real, steps=classifier_steps, seed=seed),
            },
            "largest_shifts": _largest_shifts(made.features, all_real, feature_names),
            "ms_ssim": {"synthetic": _diversity(made, max_pairs, rng), "training": _diversity(real, max_pairs, rng)},
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
