"""Does pre-training on synthetic volumes help a segmenter that has few real cases, and does confidence add to it?

    python benchmarks/downstream.py run --work_dir runs/downstream

Everything of a draw comes from its n real phantoms: generator, references of the masks, templates, confidence table.
All arms take the same number of optimiser steps and are tested on the same other phantoms. Weights are those of the
last step: there is no case to choose them by. What is finished is cached under `work_dir`: a stopped run goes on, and
more draws or arms can be added another day.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from common import ANATOMY, RESULTS, ROOT, edge_bins, known, machine
from custom.diffusion.transforms import VaryContrastd
from custom.phantom.cohort import make
from custom.runs.files import write_json
from custom.volumes.cases import case_name
from custom.volumes.intensity import label_statistics
from scipy import ndimage
from scipy.stats import spearmanr

logger = logging.getLogger(__name__)

GENERATOR, SEGMENTER = (ROOT / "bundles" / name for name in ("structdiff_cardiac", "structdiff_seg_cal"))
LABEL_NAMES = ANATOMY.names
VESSEL = "coronary arteries"
SHAPE, SPACING, POOL, TEST = (72, 72, 72), [2.0, 2.0, 2.0], 12, 8
MASKS, CALIBRATION, WORST_SHARE = 32, 8, 0.25
GENERATOR_OPTIONS = {
    "spacing_mm": SPACING,
    "roi_size": [40, 40, 40],
    "batch_size": 2,
    "samples_per_epoch": 40,
    "max_epochs": 12,
    "val_interval": 12,
}
SEGMENTER_OPTIONS = {"spacing_mm": SPACING, "roi_size": [48, 48, 48], "network_def#init_filters": 8}
PRETRAIN_EPOCHS, TUNE_EPOCHS = 48, 20  # of 16 steps
PRETRAIN_RATE, TUNE_RATE = 0.004, 0.002
REAL_SHARE = 0.5  # of the samples of an arm with real cases mixed in
REAL_ONLY, UNWEIGHTED, CAL = "real only", "synthetic, unweighted", "CAL"
FILTERED, SHUFFLED = "synthetic, worst quarter left out", "CAL, shuffled confidence"
DEFORMED, DEFORMED_VARIED = "real deformed by MGM", "real deformed by MGM, varied contrast"
ONE_CONTRAST = "synthetic, unweighted, contrast not varied"
PAINTED = "painted, randomised"
MIXED, KNOWING = "CAL, real cases mixed in", "CAL, confidence that knows the error"
ARMS = (
    *(REAL_ONLY, DEFORMED, ONE_CONTRAST, DEFORMED_VARIED, PAINTED, UNWEIGHTED, FILTERED, SHUFFLED, CAL, MIXED),
    KNOWING,
)
TRUE_ERROR_HU = 50.0  # of averages over 3^3 voxels, at which the confidence that knows them is one half
SYNTHESIS = json.loads((GENERATOR / "configs/synthesize.json").read_text())
VARYING = {"contrast_shift_hu": SYNTHESIS["contrast_shift_hu"], "label_shift_hu": ANATOMY.contrast_sd_hu}
OF_TEMPLATE = dict.fromkeys(VARYING, 0.0)
LARGE = "mean of the seven large labels"
COLUMNS = {
    "mean Dice": "dice",
    **{name: f"dice {name}" for name in LABEL_NAMES[1:] if name != VESSEL},
    "coronary Dice": f"dice {VESSEL}",
    "coronary clDice": f"cl_dice {VESSEL}",
    "coronary HD95, mm": f"hd95_mm {VESSEL}",
    "coronary pieces, error": f"betti_error_0 {VESSEL}",
    "centre line found": f"centreline_recovered {VESSEL}",
}


LARGE_LABELS = LABEL_NAMES[1:8]


def bundle_run(entry: str, bundle: Path, configs: Sequence[str], **options: Any) -> None:
    """One `monai.bundle run` as a user would start it; its output goes to `<output_dir>.log`."""
    files = [str(bundle / "configs" / name) for name in configs]
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", entry, "--config_file", str(files)]
    log = Path(f"{options['output_dir']}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        subprocess.run(
            [*command, "--bundle_root", str(bundle), *arguments], check=True, stdout=stream, stderr=subprocess.STDOUT
        )


def once(path: Path, make_it: Callable[[], None]) -> Path:
    """Run a stage unless its last file is there."""
    if not path.exists():
        logger.info("making %s", path)
        make_it()
    return path


def listing(path: Path, items: Sequence[Mapping[str, Any]], sections: Sequence[str] = ("training",)) -> str:
    """Write a datalist of absolute paths."""
    write_json(path, {section: list(items) for section in sections})
    return str(path)


def absolute(datalist: Path, section: str) -> list[dict[str, Any]]:
    """Items of a datalist with absolute paths."""
    keys = ("image", "label", "confidence", "source")
    items = json.loads(datalist.read_text())[section]
    return [{k: str(datalist.parent / v) if k in keys else v for k, v in item.items()} for item in items]


def with_confidence(item: Mapping[str, Any], values: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same case with another confidence map, written to `folder`."""
    target = folder / Path(item["confidence"]).name
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.float32), nib.load(item["confidence"]).affine), target)
    return {**item, "confidence": str(target)}


def shuffled(items: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The same cases with each confidence map permuted within its labels, and the scores dealt out anew."""
    rng = np.random.default_rng(0)
    scores = rng.permutation([item["score_hu"] for item in items])
    result = []
    for item, score in zip(items, scores, strict=True):
        values, label = (np.array(nib.load(item[key]).dataobj) for key in ("confidence", "label"))
        for k in np.unique(label):
            values[label == k] = rng.permutation(values[label == k])
        result.append({**with_confidence(item, values, folder), "score_hu": float(score)})
    return result


def knowing_the_error(items: Sequence[Mapping[str, Any]], truths: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The same cases with the confidence that knows the error: the upper bound of what any confidence can give."""
    result = []
    for item, truth in zip(items, truths, strict=True):
        image, true = (np.asarray(nib.load(path).dataobj, np.float32) for path in (item["image"], truth))
        values = 1 / (1 + (ndimage.uniform_filter(image - true, 3) / TRUE_ERROR_HU) ** 2)
        result.append(with_confidence(item, values, folder))
    return result


def scaled_by_edge(items: Sequence[Mapping[str, Any]], table: Path, folder: Path) -> list[dict[str, Any]]:
    """The same cases with variances scaled by one tau for each label and distance to its edge."""
    tau, result = np.array(json.loads(table.read_text())["tau_hu2"]), []
    for item in items:
        image, label = (nib.load(item[key]) for key in ("confidence", "label"))
        ids = np.asarray(label.dataobj).astype(int)
        cells = ids * 5 + edge_bins(ids, SPACING)
        values = -np.log(np.asarray(image.dataobj, np.float64).clip(0.05, 1)) * tau[ids]
        for cell in np.unique(cells):
            inside = cells == cell
            values[inside] = 0.5 ** (values[inside] / max(np.quantile(values[inside], 0.9), 1e-6))
        result.append(with_confidence(item, values.clip(0.05, 1), folder))
    return result


def pair_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """Image, label and label statistics of a case, named as those of a template."""
    volumes = (np.asarray(nib.load(item[key]).dataobj, np.float32)[None] for key in ("image", "label"))
    image, label = map(torch.from_numpy, volumes)
    statistics = label_statistics(image[None], label[None], len(LABEL_NAMES))
    return {"template_image": image, "template_label": label, "statistics": statistics}


def in_contrast(item: Mapping[str, Any], folder: Path, *, case: str, seed: int, **template: Any) -> dict[str, str]:
    """The same case, its image in the contrast that `synthesize` draws for `case` and a template of its statistics."""
    vary = VaryContrastd(seed=seed, plausible_hu=ANATOMY.plausible_hu, **VARYING)
    image = vary({**pair_of(item), **template, "case": case})["template_image"]
    target = folder / Path(item["image"]).name
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image[0].numpy(), nib.load(item["image"]).affine), target)
    return {"image": str(target), "label": item["label"]}


def true_images(work: Path, items: Sequence[Mapping[str, Any]], seed: int | None) -> list[str]:
    """What the generator should have rendered, with one real case: that case deformed to the same mask.

    In the contrast that was drawn with `seed`, None: in its own. Grain differs from that of a rendering.
    """
    (real,) = absolute(work / "real.json", "training")
    deformed, statistics = (
        {case_name(c["label"]): c["image"] for c in deformed_cases(work)},
        pair_of(real)["statistics"],
    )
    truths = []
    for item in items:
        name = case_name(item["label"])
        pair = {"image": deformed[name.split("_from_")[0]], "label": item["label"]}
        if seed is not None:
            pair = in_contrast(pair, work / "truths", case=name, seed=seed, statistics=statistics)
        truths.append(pair["image"])
    return truths


def synthesize(work: Path, real: Sequence[Mapping[str, Any]], seed: int, arms: Sequence[str]) -> None:
    """Generator, masks, confidence table and synthetic set of one draw; of one contrast, and painted, if arms ask."""
    own = listing(work / "real.json", real, ("training", "validation"))
    models = {"ckpt_dir": work / "models", "seed": seed}

    def train() -> None:
        options = {"datalists": [own], "output_dir": work / "generator", **models, **GENERATOR_OPTIONS}
        bundle_run("training", GENERATOR, ["train.json"], **options)

    def deform() -> None:
        options = {"count": MASKS + CALIBRATION, "with_image": True, "workers": 1, "seed": seed}
        bundle_run(
            "generating",
            GENERATOR,
            ["generate_masks.json"],
            reference_datalist=own,
            output_dir=work / "masks",
            **options,
        )

    once(work / "models/model.pt", train)
    masks = absolute(once(work / "masks/datalist.json", deform), "training")
    shared = {"template_datalist": own, "spacing_mm": SPACING, **models}

    def calibrate() -> None:
        chosen = listing(work / "calibration.json", masks[MASKS:])
        bundle_run(
            "calibrating",
            GENERATOR,
            ["inference.json", "synthesize.json", "calibrate.json"],
            mask_datalist=chosen,
            mask_section="training",
            output_dir=work / "calibration",
            **shared,
        )

    def render(folder: Path, contrast: Mapping[str, Any]) -> None:
        chosen = listing(work / "targets.json", masks[:MASKS])
        bundle_run(
            "synthesizing",
            GENERATOR,
            ["inference.json", "synthesize.json"],
            mask_datalist=chosen,
            output_dir=folder,
            **shared,
            **contrast,
        )

    once(work / "models/confidence.json", calibrate)
    once(work / "synthetic/datalist.json", lambda: render(work / "synthetic", VARYING))
    if PAINTED in arms:
        once(work / "painted/datalist.json", lambda: render(work / "painted", {"mode": "painted"}))
    if ONE_CONTRAST in arms:
        once(work / "one_contrast/datalist.json", lambda: render(work / "one_contrast", OF_TEMPLATE))


def training_sets(work: Path, arms: Sequence[str], seed: int) -> dict[str, list[dict[str, Any]]]:
    """What those of `arms` are pre-trained on for which there is something."""
    items, masks = absolute(work / "synthetic/datalist.json", "training"), deformed_cases(work)
    scores = [item["score_hu"] for item in items]
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        DEFORMED: lambda: masks,
        DEFORMED_VARIED: lambda: [
            in_contrast(case, work / "deformed_varied", case=Path(case["label"]).name, seed=0) for case in masks
        ],
        ONE_CONTRAST: lambda: without_confidence(absolute(work / "one_contrast/datalist.json", "training")),
        PAINTED: lambda: without_confidence(absolute(work / "painted/datalist.json", "training")),
        UNWEIGHTED: lambda: without_confidence(items),
        FILTERED: lambda: without_confidence(
            [item for item in items if item["score_hu"] <= np.quantile(scores, 1 - WORST_SHARE)]
        ),
        SHUFFLED: lambda: shuffled(items, work / "shuffled"),
        CAL: lambda: items,
        MIXED: lambda: items,
    }
    if len(absolute(work / "real.json", "training")) == 1:  # of several, the true image of a rendering is not known
        makers[KNOWING] = lambda: knowing_the_error(items, true_images(work, items, seed), work / "true_error")
    sets = {arm: makers[arm]() for arm in arms if arm in makers}
    for arm, cases in sets.items():
        if not cases:
            logger.warning("%s: nothing to train the arm %r on", work, arm)
    return {arm: cases for arm, cases in sets.items() if cases}


def deformed_cases(work: Path) -> list[dict[str, Any]]:
    """The masks that are rendered, each with the real image deformed in the same way."""
    return without_confidence(absolute(work / "masks/datalist.json", "training")[:MASKS])


def without_confidence(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Image and label alone."""
    return [{"image": case["image"], "label": case["label"]} for case in cases]


def segment(work: Path, arm: str, data: Sequence[Mapping[str, Any]], test: str, seed: int) -> dict[str, float]:
    """Pre-train, fine-tune on the real cases and test one arm."""
    folder = work / "arms" / arm.replace(", ", "_").replace(" ", "_")
    common: dict[str, Any] = {
        "ckpt_dir": folder / "models",
        "seed": seed,
        "validate#dataset#data": [],
        **SEGMENTER_OPTIONS,
    }
    tune_epochs = TUNE_EPOCHS + (PRETRAIN_EPOCHS if arm == REAL_ONLY else 0)

    def pretrain() -> None:
        bundle_run(
            "pretraining",
            SEGMENTER,
            ["train.json", "pretrain.json"],
            synthetic_datalists=[listing(folder / "synthetic.json", data)],
            max_epochs=PRETRAIN_EPOCHS,
            learning_rate=PRETRAIN_RATE,
            warmup_epochs=4,
            ramp_epochs=6,
            output_dir=folder / "pretraining",
            real_datalists=[str(work / "real.json")] if arm == MIXED else [],
            real_share=REAL_SHARE,
            **common,
        )

    def tune() -> None:
        bundle_run(
            "training",
            SEGMENTER,
            ["train.json"],
            datalists=[str(work / "real.json")],
            max_epochs=tune_epochs,
            learning_rate=PRETRAIN_RATE if arm == REAL_ONLY else TUNE_RATE,
            output_dir=folder / "training",
            **common,
        )

    def evaluate() -> None:
        options = {k: v for k, v in common.items() if not k.startswith("validate")}
        bundle_run(
            "evaluating",
            SEGMENTER,
            ["train.json", "evaluate.json"],
            datalists=[test],
            output_dir=folder / "evaluation",
            **options,
        )

    if arm != REAL_ONLY:
        once(folder / "models/pretrained.pt", pretrain)
    once(folder / "models/model.pt", tune)
    metrics = known(json.loads(once(folder / "evaluation/metrics.json", evaluate).read_text()))
    return {name: metrics.get(key, float("nan")) for name, key in COLUMNS.items()}


def phantoms(work: Path, *, seed: int, training: int, test: int) -> dict[str, list[dict[str, Any]]]:
    """Training and test cases of a cohort below `work`."""
    fraction = test / (training + test)
    options = {"shape": SHAPE, "spacing_mm": SPACING[0], "validation_fraction": 0.0, "test_fraction": fraction}
    datalist = Path(make(str(work / "cohort"), training + test, seed, **options))
    return {section: absolute(datalist, section) for section in ("training", "test")}


def draw_of(n_real: int, draw: int, pool: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The real cases of one draw; draws of one size share no case while the pool lasts."""
    order = np.random.default_rng(n_real).permutation(len(pool))
    return [dict(pool[i % len(pool)]) for i in np.resize(order, (draw + 1) * n_real)[draw * n_real :]]


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Of the values that are defined; NaN when none is."""
    known = [v for v in values if not np.isnan(v)]
    return (float(np.mean(known)), float(np.std(known))) if known else (float("nan"), float("nan"))


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread over draws of every arm and measure, and its paired differences from the two baselines."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for arm, column in product(ARMS, (LARGE, *COLUMNS)):
        values = [run["arms"][arm][column] for run in runs if arm in run["arms"]]
        if not values:
            continue
        cell = dict(zip(("mean", "sd"), mean_sd(values), strict=True))
        for base in (REAL_ONLY, UNWEIGHTED):
            both = [run["arms"] for run in runs if {arm, base} <= set(run["arms"])]
            if both and arm != base:
                cell[f"minus {base}"] = mean_sd([arms[arm][column] - arms[base][column] for arms in both])[0]
        table.setdefault(arm, {})[column] = cell
    return table


def main(
    work_dir: str = "runs/downstream",
    n_real: Sequence[int] = (1, 4),
    draws: Sequence[int] = (0, 1, 2),
    arms: Sequence[str] = ARMS,
) -> None:
    """Run what is missing, print the table and write benchmarks/results/downstream.json.

    Args:
        work_dir: cache of everything.
        n_real: numbers of real cases.
        draws: numbers of the draws, from 0; several processes may take different ones.
        arms: names of arms, some of `ARMS`.
    """
    work = Path(work_dir).resolve()
    cases = phantoms(work, seed=500, training=POOL, test=TEST)
    test = listing(work / "test.json", cases["test"], ("test",))
    for draw in draws:
        for n in n_real:
            own = work / f"n{n}_draw{draw}"
            real = draw_of(n, draw, cases["training"])
            synthesize(own, real, draw, arms)
            sets = training_sets(own, arms, draw)
            for arm in (arm for arm in arms if arm == REAL_ONLY or arm in sets):
                result = own / "results" / f"{arm}.json"
                once(result, lambda: write_json(result, segment(own, arm, sets.get(arm, []), test, draw)))  # noqa: B023
            report(work)


def report(work_dir: str | Path) -> None:
    """Print the table of what is finished and write the JSON."""
    runs: list[dict[str, Any]] = []
    for folder in sorted(Path(work_dir).resolve().glob("n*_draw*")):
        n, draw = (int(part) for part in folder.name[1:].split("_draw"))
        arms = {arm: json.loads(f.read_text()) for arm in ARMS if (f := folder / "results" / f"{arm}.json").exists()}
        for values in arms.values():
            values[LARGE] = float(np.mean([values[name] for name in LARGE_LABELS]))
        if arms:
            runs.append({"n_real": n, "draw": draw, "arms": arms})
    summary = {n: summarise([r for r in runs if r["n_real"] == n]) for n in sorted({r["n_real"] for r in runs})}
    write_json(RESULTS / "downstream.json", {"machine": machine(), "summary": summary, "runs": runs})
    for n, table in summary.items():
        print(f"\n{n} real case(s), {sum(r['n_real'] == n for r in runs)} draws")
        columns = (LARGE, *COLUMNS)
        print("| arm | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
        for arm, row in table.items():
            print(f"| {arm} | " + " | ".join(f"{row[c]['mean']:.3f} ± {row[c]['sd']:.3f}" for c in columns) + " |")


def confidence(work_dir: str = "runs/downstream", draws: Sequence[int] = (0, 1), cases: int = 8) -> None:
    """What confidence can tell CAL inside a label, with one real case; writes benchmarks/results/cal_confidence.json.

    Of synthetic volumes in the contrast of their case, whose true image is known: the case deformed to the same mask.
    Printed for each label: Spearman correlation with the true error of 3^3 means, and the 10 and 90 % quantiles of the
    voxel weights, of the maps as they are, of maps scaled by label and edge distance, and of perfect ones.

    Raises:
        ValueError: naming a set of fewer than `cases` accepted volumes.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    for draw in draws:
        work = Path(work_dir).resolve() / f"n1_draw{draw}"
        datalist = work / "one_contrast/datalist.json"
        items = absolute(datalist, "training")
        if not 0 < cases <= len(items):
            raise ValueError(
                f"{datalist}: the gate accepted {len(items)} volumes, --cases asks for {cases}; ask for 1 to these, "
                "leave the draw out (--draws), or train longer: its list `rejected` has the reasons"
            )
        truths = true_images(work, items, None)
        sets = {
            "by label": items,
            "by label and edge distance": scaled_by_edge(items, work / "models/confidence.json", work / "by_edge"),
            "true error": knowing_the_error(items, truths, work / "true_error_one_contrast"),
        }
        for number in range(cases):
            label = np.asarray(nib.load(items[number]["label"]).dataobj).astype(int)
            maps = {name: np.asarray(nib.load(s[number]["confidence"]).dataobj) for name, s in sets.items()}
            for k, name in enumerate(LABEL_NAMES):
                row, inside = rows.setdefault(name, {}), label == k
                for scale, values in maps.items():
                    c = values[inside]
                    row.setdefault(f"{scale}: rank correlation", []).append(spearmanr(c, maps["true error"][inside])[0])
                    for q in (0.1, 0.9):
                        row.setdefault(f"{scale}: weight at {q}", []).append(float(np.quantile(c / c.mean(), q)))
    table = {name: {column: float(np.mean(v)) for column, v in row.items()} for name, row in rows.items()}
    write_json(RESULTS / "cal_confidence.json", {"machine": machine(), "cases": cases * len(draws), "labels": table})
    columns = list(next(iter(table.values())))
    print("| label | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.2f}" for c in columns) + " |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire({"run": main, "report": report, "confidence": confidence})
