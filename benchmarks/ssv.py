"""Does a rendering know where it is wrong? Held-out phantoms, whose noise-free truth is known.

    python benchmarks/ssv.py --ckpt_dir bundles/structdiff_cardiac/models

Every score is judged by the error of one and the same structure, a full sample of 12 calls: its absolute difference
from the noise-free truth, in HU, in the heart (labels and 6 mm around them). Rivals have the same 30 network calls,
those of the image included; the trajectory is that of the image (12 calls); predicted variance, edge distance and
chance have none. Faults are planted by leaving the last branches of the coronaries out of the mask that the network
sees. Every finished case is cached under `work_dir`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from common import RESULTS, ROOT, edge_bins, machine, template_chain, trained_renderer
from custom.confidence.inferers import PredictedVarianceInferer, SkipSamplingInferer
from custom.confidence.table import tau_table
from custom.confidence.variance import RunningVariance, confidence, sample_score
from custom.diffusion.context import RESIDUAL_UNIT_HU, Context
from custom.diffusion.formulas import amplitudes
from custom.diffusion.noise import case_noise
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.schedule import spaced_timesteps
from custom.diffusion.transforms import PaintPriord
from custom.geometry.vessels import anchored, draw, prune, read_tree
from custom.phantom.cohort import make_subject
from custom.runs.files import file_hash, write_json
from custom.volumes.grids import crop_to, pad_to_multiple
from custom.volumes.haar import haar_pack, haar_unpack
from ddim import ListedDDIMScheduler
from scipy import ndimage, stats

logger = logging.getLogger(__name__)

SEED, SHAPE, SPACING, NUM_LABELS = 30_000, (80, 80, 80), (1.5, 1.5, 1.5), 11
VESSEL, AORTA = 9, 6
STRIDES, RIVAL_CALLS = (4, 6, 8, 12), 9  # 30 calls; 12 + 9 + 9 of the rivals
STRATA = {"chambers": [2, 3, 4, 5], "myocardium": [1], "great vessels": [6, 7, 8, 10], "coronaries": [9]}
TOLD = "predicted variance, told the label"  # for faults: where the label is known not to be what the network saw
METHODS = (
    "predicted variance (default)",
    "skip sampling",
    "skip sampling, DDIM",
    "several seeds",
    "trajectory",
    "offset schedules",
    "edge distance",
    "random",
)


class Recorder:
    """A network that keeps what its flow was given and what it answered."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.calls = network, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def flow(self, y: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        f = self.network.flow(y, timesteps, features)
        self.calls.append((y, timesteps, f))
        return f


def pair(case: int) -> tuple[dict[str, Any], np.ndarray]:
    """A held-out subject with another anatomy of the same appearance as template, and its noise-free truth."""
    target, template = (
        make_subject(SEED, index, shape=SHAPE, spacing_mm=SPACING[0], appearance_seed=case)
        for index in (case, 1000 + case)
    )
    volumes = {"image": target.image, "label": target.label, "clean": target.clean}
    volumes |= {"template_image": template.image, "template_label": template.label}
    item = {key: torch.from_numpy(volume.astype(np.float32))[None] for key, volume in volumes.items()}
    guide = template_chain([1, 2, 3, 4, 5, 6, 7])
    return guide({**item, "case": f"ssv_{case}"}), target.label  # type: ignore[return-value]


def variance_of(images: list[torch.Tensor]) -> torch.Tensor:
    running = RunningVariance()
    for image in images:
        running.add(image)
    return running.value()[0, 0]


def offset_times(calls: int, offset: float) -> list[int]:
    """Times between the end points moved by a share of their distance."""
    times = spaced_timesteps(calls)
    step = times[0] - times[1]
    return [times[0], *(round(t + offset * step) for t in times[1:])]


def trajectory_variance(recorder: Recorder, context: torch.Tensor) -> torch.Tensor:
    """Variance over the steps of the predicted clean image; the mean is common to all."""
    network = recorder.network
    sigma = network.encode(pad_to_multiple(context, 2)).sigma
    running = RunningVariance()
    for bands, timesteps, velocity in recorder.calls:
        a, s = amplitudes(network.alphas_cumprod, timesteps, bands.ndim)
        clean = crop_to(sigma, bands.shape[2:]) * (a * bands - s * velocity)
        running.add(crop_to(haar_unpack(clean), context.shape[2:]) * RESIDUAL_UNIT_HU)
    return running.value()[0, 0]


@torch.no_grad()
def ddim(network: torch.nn.Module, context: torch.Tensor, name: str, calls: int) -> torch.Tensor:
    """The structure by plain DDIM, whose error of discretisation differs between schedules."""
    scheduler, condition = ListedDDIMScheduler(calls), network.encode(pad_to_multiple(context, 2))
    x = haar_pack(pad_to_multiple(case_noise((1, *context.shape[2:]), 0, name)[None], 2))
    for t in scheduler.timesteps.tolist():
        x, _ = scheduler.step(network.flow(x, torch.tensor([t]), condition.features), t, x)
    mean, sigma = (crop_to(part, x.shape[2:]) for part in (condition.mean, condition.sigma))
    residual = crop_to(haar_unpack(mean + sigma * x), context.shape[2:])
    return residual * RESIDUAL_UNIT_HU + Context.of(context).prior_hu


@torch.no_grad()
def scores(network: torch.nn.Module, item: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The image (H, W, D) and every score of it, higher where it is to be trusted less."""
    context, name = item["context"][None].as_subclass(torch.Tensor), [item["case"]]
    recorder = Recorder(network)
    skip = SkipSamplingInferer(strides=STRIDES)
    both = skip(context, network, name)
    image = both[:, :1]
    longest = StructDiffInferer(max(STRIDES))
    again = longest(context, recorder, name)
    assert torch.equal(again, image), "the delivered image must be that of the longest schedule"
    seeds = [image] + [StructDiffInferer(RIVAL_CALLS, seed=s)(context, network, name) for s in (1, 2)]
    offsets = [image] + [
        longest.render(context, network, name, offset_times(RIVAL_CALLS, offset)) for offset in (-0.3, 0.3)
    ]
    label = item["label"][0].as_subclass(torch.Tensor)
    depth = torch.zeros(label.shape)
    for k in label.unique():
        inside = label == k
        depth[inside] = torch.from_numpy(ndimage.distance_transform_edt(inside, sampling=SPACING)).float()[inside]
    return image[0, 0], {
        "predicted variance (default)": PredictedVarianceInferer().variance(image, context, network)[0, 0],
        "skip sampling": both[0, 1],
        "skip sampling, DDIM": variance_of([ddim(network, context, item["case"], calls) for calls in STRIDES]),
        "several seeds": variance_of(seeds),
        "trajectory": trajectory_variance(recorder, context),
        "offset schedules": variance_of(offsets),
        "edge distance": 1 / depth,
        "random": torch.rand(label.shape, generator=torch.Generator().manual_seed(0)),
    }


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive voxel has the higher score (Mann-Whitney); NaN without both kinds."""
    n = int(positive.sum())
    if n == 0 or n == len(positive):
        return float("nan")
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def ause(score: np.ndarray, error: np.ndarray) -> float:
    """Area between the sparsification curve and the oracle's, over the mean error; 0 is perfect."""

    def curve(order: np.ndarray) -> np.ndarray:
        kept = np.cumsum(error[order]) / np.arange(1, len(order) + 1)  # mean error of the most trusted
        return kept[np.linspace(len(order) // 100, len(order) - 1, 100).astype(int)]

    return float((curve(np.argsort(score, kind="stable")) - curve(np.argsort(error))).mean() / error.mean())


def judge(score: np.ndarray, error: np.ndarray, label: np.ndarray, bins: np.ndarray) -> dict[str, float]:
    """Agreement of one score with the error, in the heart and by stratum."""
    row = {
        "spearman": float(stats.spearmanr(score, error)[0]),
        "auroc_worst_tenth": auroc(score, error >= np.quantile(error, 0.9)),
        "ause": ause(score, error),
    }
    for name, ids in STRATA.items():
        inside = np.isin(label, ids)
        row[f"spearman {name}"] = float(stats.spearmanr(score[inside], error[inside])[0])
    for b in (1, 2):  # nothing is nearer than a voxel of 1.5 mm
        inside = (bins == b) & (label > 0)
        row[f"spearman bin {b}"] = float(stats.spearmanr(score[inside], error[inside])[0])
    return row


def planted(label: np.ndarray, case: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask without the last branches of its coronaries, and which vessel voxels are missing."""
    tree = anchored(read_tree(label == VESSEL, SPACING), label == AORTA, SPACING)
    pruned, _ = prune(tree, probability=1.0, max_length_mm=80.0, rng=np.random.default_rng(case))
    kept = ndimage.binary_dilation(draw(pruned, label.shape, SPACING), iterations=1)
    missing = (label == VESSEL) & ~kept
    damaged = label.copy()
    damaged[missing] = 0
    return damaged, missing


def case_results(case: int, network: torch.nn.Module, paint: Callable[..., Any], fault: bool) -> dict[str, Any]:
    """Everything that is measured on one subject; arrays for calibration are left out of the cache."""
    item, label = pair(case)
    image, rows = scores(network, paint(item))
    truth = item["clean"][0].as_subclass(torch.Tensor)
    error = (image - truth).abs().numpy()
    near = ndimage.distance_transform_edt(label == 0, sampling=SPACING) <= 6
    bins = edge_bins(label, SPACING)
    result: dict[str, Any] = {
        "error_hu": float(error[near].mean()),
        "sample_scores_hu": {m: sample_score(s, torch.from_numpy(label.astype(np.float32))) for m, s in rows.items()},
        "methods": {m: judge(s.numpy()[near], error[near], label[near], bins[near]) for m, s in rows.items()},
    }
    if fault:
        damaged, missing = planted(label, case)
        seen = {**item, "label": torch.from_numpy(damaged.astype(np.float32))[None]}
        image_wrong, wrong = scores(network, paint(seen))
        asked = paint(item)["context"][None].as_subclass(
            torch.Tensor
        )  # trust in what the label says, not what was seen
        wrong[TOLD] = PredictedVarianceInferer().variance(image_wrong[None, None], asked, network)[0, 0]
        vessel = label == VESSEL
        result["fault_voxels"] = int(missing.sum())
        result["fault_auroc"] = {m: auroc(s.numpy()[vessel], missing[vessel]) for m, s in wrong.items()}
    arrays = {"variance": rows["predicted variance (default)"], "label": torch.from_numpy(label.astype(np.float32))}
    return result | {"arrays": arrays | {"error": torch.from_numpy(error), "near": torch.from_numpy(near)}}


def reliability(cases: list[dict[str, torch.Tensor]], calibration: int) -> dict[str, Any]:
    """Confidence with tables from the first cases, on the others: mean error by tenth of confidence."""
    known = [(c["variance"], c["label"]) for c in cases[:calibration]]
    tau, _ = tau_table(known, num_labels=NUM_LABELS)
    c_all, e_all = [], []
    for case in cases[calibration:]:
        inside = case["near"]
        c_all.append(confidence(case["variance"], case["label"], tau)[inside])
        e_all.append(case["error"][inside])
    c, e = torch.cat(c_all).numpy(), torch.cat(e_all).numpy()
    limits = np.quantile(c, np.linspace(0, 1, 11))
    tenth = np.clip(np.searchsorted(limits[1:-1], c, side="right"), 0, 9)
    return {
        "share_at_least_one_half": float((c >= 0.5).mean()),
        "mean_error_hu_by_tenth_of_confidence": [float(e[tenth == i].mean()) for i in range(10)],
        "mean_confidence_by_tenth": [float(c[tenth == i].mean()) for i in range(10)],
    }


def main(
    ckpt_dir: str, work_dir: str = str(ROOT / "runs/ssv"), cases: int = 20, faults: int = 8, calibration: int = 5
) -> None:
    """Measure, print and write benchmarks/results/ssv.json.

    Args:
        ckpt_dir: folder with model.pt, trained at 1.5 mm with the shipped config.
        work_dir: cache of finished cases.
        cases: subjects, `calibration` of them for the confidence tables alone.
        faults: subjects with planted faults.
        calibration: subjects whose variances make the tables.
    """
    work = Path(work_dir) / file_hash(str(Path(ckpt_dir) / "model.pt"))
    parser = trained_renderer(ckpt_dir, target_masks=[], templates=[])
    network = parser.get_parsed_content("network_def")
    paint = PaintPriord(nominal_hu=parser.get_parsed_content("labels").nominal_hu, thin_labels=[VESSEL])
    results, arrays = [], []
    for case in range(cases):
        file = work / f"case_{case:02d}.json"
        if not file.exists() or ("fault_auroc" in json.loads(file.read_text())) != (case < faults):
            result = case_results(case, network, paint, case < faults)
            work.mkdir(parents=True, exist_ok=True)
            torch.save(result.pop("arrays"), file.with_suffix(".pt"))
            write_json(file, result)
        results.append(json.loads(file.read_text()))
        arrays.append(torch.load(file.with_suffix(".pt"), weights_only=True))
        logger.info("case %d: %s", case, results[-1]["methods"]["predicted variance (default)"])

    def over_cases(values: list[float | None]) -> dict[str, float]:
        known = np.array(values, dtype=float)  # NaN is None in a file
        return {"mean": float(np.nanmean(known)), "sd": float(np.nanstd(known))}

    columns = list(results[0]["methods"]["random"])
    summary: dict[str, Any] = {
        m: {c: over_cases([r["methods"][m][c] for r in results]) for c in columns} for m in METHODS
    }
    for m in (*METHODS, TOLD):
        faulty = [r["fault_auroc"][m] for r in results if "fault_auroc" in r]
        summary.setdefault(m, {})["fault auroc"] = over_cases(faulty)
    errors = [r["error_hu"] for r in results]
    samples = {m: float(stats.spearmanr([r["sample_scores_hu"][m] for r in results], errors)[0]) for m in METHODS}
    reliable = reliability(arrays, calibration)
    content = {"machine": machine(), "cases": cases, "summary": summary, "sample_spearman": samples}
    write_json(RESULTS / "ssv.json", {**content, "reliability": reliable, "runs": results})
    shown = ["spearman", "auroc_worst_tenth", "ause", *(f"spearman {s}" for s in STRATA), "fault auroc"]
    print("| method | " + " | ".join(shown) + " |\n|" + "---|" * (len(shown) + 1))
    for m, row in summary.items():
        cells = [f"{row[c]['mean']:.2f} ± {row[c]['sd']:.2f}" if c in row else "" for c in shown]
        print(f"| {m} | " + " | ".join(cells) + " |")
    print("sample-level Spearman:", samples)
    print("reliability:", reliable)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(main)
