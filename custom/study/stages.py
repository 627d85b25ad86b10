"""The stages of a study, in their order: what each is, its command, when it is done, and about how long it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom.runs.options import is_number
from custom.study.bundles import Bundles

SECONDS = {
    "mask": 12.0,
    "rendering": 40.0,
    "measuring": 20.0,
    "step": 0.9,
    "validation": 8.0,
    "evaluation": 30.0,
    "generator step": 1.1,
    "phantom": 8.0,
    "start": 20.0,
}
"""Of a case, or a training step, on two cores, at 0.8 mm: a first guess, which gives way to what a run measures."""
SYNTHESIS = ("inference.json", "synthesize.json")
_EPOCH = re.compile(r"Epoch: (\d+)/(\d+), Iter: (\d+)/(\d+)")
_SAMPLES, _BATCH, _VAL_INTERVAL = 32, 2, 5  # of the segmenter's train.json
_PHANTOMS = 40
_SPACINGS_MM = (0.5, 3.0)  # ours: finer masks are more than the generator draws, coarser ones hold no coronaries


@dataclass(frozen=True)
class Stage:
    """One command of a study.

    Attributes:
        name: also of its log and of its note that it is done.
        title: what it does, in words.
        command: arguments of python.
        product: file that it leaves.
        seconds: first guess of how long it takes.
        needs: names of stages that it works on the results of.
        share: how much of it is done, 0 to 1, by its log and what it has written; None where that cannot be told.
    """

    name: str
    title: str
    command: Sequence[str]
    product: Path
    seconds: float
    needs: Sequence[str] = ()
    share: Callable[[Path], float | None] = lambda log: None


def _counted(pattern: str, root: Path, total: int) -> Callable[[Path], float | None]:
    return lambda log: min(1.0, len(list(root.glob(pattern))) / total)


def trained(log: Path) -> float | None:
    """Share of a training that its log tells of; None before the first step."""
    found = _EPOCH.findall(log.read_text(errors="replace")) if log.is_file() else []
    if not found:
        return None
    epoch, epochs, step, steps = map(int, found[-1])
    return (epoch - 1 + step / steps) / epochs


@dataclass(frozen=True)
class Settings:
    """What a user decides of a study.

    Attributes:
        count: new masks, each rendered once.
        epochs: of the segmenter on real cases alone; with pre-training two thirds of them are its.
        finetune: epochs for which the generator is trained on with the cases; 0 takes the shipped one as it is.
        workers: processes that make masks.
        seed: of all stages.
        spacing_mm: voxel size of new masks and their images.
    """

    count: int = 30
    epochs: int = 150
    finetune: int = 0
    workers: int = 2
    seed: int = 0
    spacing_mm: float = 0.8

    def __post_init__(self) -> None:
        least = {"count": 1, "epochs": 3, "finetune": 0, "workers": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(
                    f"{name}: must be a whole number, at least {low}, got {value!r}; for example {low + 1}"
                )
        if not is_number(self.spacing_mm) or not _SPACINGS_MM[0] <= self.spacing_mm <= _SPACINGS_MM[1]:
            raise ValueError(
                f"spacing_mm: must be {_SPACINGS_MM[0]} to {_SPACINGS_MM[1]}, got {self.spacing_mm!r}; images are best "
                "from 0.8 to 1.5"
            )


def plan(bundles: Bundles, datalist: Path, root: Path, settings: Settings, sizes: Mapping[str, int]) -> list[Stage]:
    """All stages of a study.

    Args:
        bundles: both.
        datalist: JSON with "training", "validation" and "test".
        root: folder of all results.
        settings: of the study.
        sizes: section -> number of cases.
    """
    generator, segmenter = bundles.generator, bundles.segmenter
    seed = {"seed": settings.seed}
    cases = {"datalists": [str(datalist)]}
    stages: list[Stage] = []

    def add(name: str, title: str, bundle: Path, entry: str, configs: Sequence[str], product: str, **more: Any) -> None:
        command = bundles.command(bundle, entry, configs, {**more.pop("options"), **seed})
        stages.append(Stage(name, title, command, root / product, **more))

    add(
        "masks",
        f"{settings.count} new label maps from {sizes['training']} cases",
        generator,
        "generating",
        ["generate_masks.json"],
        "masks/datalist.json",
        options={
            "reference_datalist": datalist,
            "count": settings.count,
            "spacing_mm": [settings.spacing_mm] * 3,
            "workers": settings.workers,
            "output_dir": root / "masks",
        },
        seconds=SECONDS["start"] + SECONDS["mask"] * (settings.count + sizes["training"]) / max(1, settings.workers),
        share=_counted("records/*.json", root / "masks", settings.count),
    )
    weights = {"ckpt_dir": generator / "models"}
    if settings.finetune:
        weights = {"ckpt_dir": root / "generator/models"}
        stages += _finetuning(bundles, datalist, root, settings)
    templates = {"template_datalist": datalist, "confidence_table": root / "confidence.json", **weights}
    tuned = ["generator"] * bool(settings.finetune)
    add(
        "confidence",
        f"how far to trust an image, by {sizes['validation']} held-out case(s)",
        generator,
        "calibrating",
        [*SYNTHESIS, "calibrate.json"],
        "confidence.json",
        options=templates,
        seconds=SECONDS["start"] + SECONDS["rendering"] * sizes["training"] * sizes["validation"],
        needs=tuned,
    )
    synthetic = {**templates, "output_dir": root / "synthetic"}
    add(
        "images",
        f"an image and a confidence map of each of the {settings.count} label maps",
        generator,
        "synthesizing",
        SYNTHESIS,
        "synthetic/datalist.json",
        options={**synthetic, "mask_datalist": root / "masks/datalist.json"},
        seconds=SECONDS["start"] + SECONDS["rendering"] * settings.count,
        needs=["masks", "confidence", *tuned],
        share=_counted("records/*.json", root / "synthetic", settings.count),
    )
    if sizes["training"] > 1 and sizes["validation"] + sizes["test"] > 1:
        add(
            "measures",
            "the set beside real cases: realism, diversity, copies",
            generator,
            "measuring",
            [*SYNTHESIS, "measure_set.json"],
            "synthetic/set_metrics.json",
            options=synthetic,
            seconds=SECONDS["start"] + SECONDS["measuring"] * (settings.count + sum(sizes.values())),
            needs=["images"],
        )
    cal, real = root / "cal", root / "real_only"
    pretraining, fine = 2 * settings.epochs // 3, settings.epochs - 2 * settings.epochs // 3
    add(
        "pretraining",
        f"a segmenter pre-trained on the set, trusting it as far as it should (CAL), {pretraining} epochs",
        segmenter,
        "pretraining",
        ["train.json", "pretrain.json"],
        "cal/models/pretrained.pt",
        options={
            **cases,
            "synthetic_datalists": [str(root / "synthetic/datalist.json")],
            "real_datalists": [str(datalist)],
            **_epochs(pretraining),
            "warmup_epochs": pretraining // 10,
            "ramp_epochs": pretraining // 5,
            "output_dir": cal / "pretraining",
            "ckpt_dir": cal / "models",
        },
        seconds=_training_seconds(pretraining),
        needs=["images"],
        share=trained,
    )
    add(
        "finetuning",
        f"the same, fine-tuned on the real cases, {fine} epochs",
        segmenter,
        "training",
        ["train.json"],
        "cal/models/model.pt",
        options={
            **cases,
            **_epochs(fine),
            "learning_rate": 0.002,
            "output_dir": cal / "training",
            "ckpt_dir": cal / "models",
        },
        seconds=_training_seconds(fine),
        needs=["pretraining"],
        share=trained,
    )
    add(
        "real_only",
        f"a segmenter of real cases alone, to compare with, {settings.epochs} epochs",
        segmenter,
        "training",
        ["train.json"],
        "real_only/models/model.pt",
        options={**cases, **_epochs(settings.epochs), "output_dir": real / "training", "ckpt_dir": real / "models"},
        seconds=_training_seconds(settings.epochs),
        share=trained,
    )
    for name, needed in (("real_only", "real_only"), ("cal", "finetuning")):
        add(
            f"evaluation_{name}",
            f"{name} on {sizes['test']} test case(s)",
            segmenter,
            "evaluating",
            ["train.json", "evaluate.json"],
            f"{name}/evaluation/labels.csv",
            options={**cases, "output_dir": root / name / "evaluation", "ckpt_dir": root / name / "models"},
            seconds=SECONDS["start"] + SECONDS["evaluation"] * sizes["test"],
            needs=[needed],
        )
    compared = {"real cases only": real / "evaluation", "CAL, then real cases": cal / "evaluation"}
    add(
        "report",
        "both segmenters and the set on one page",
        generator,
        "reporting",
        SYNTHESIS,
        "synthetic/report.html",
        options={"output_dir": root / "synthetic", "evaluations": {k: str(v) for k, v in compared.items()}},
        seconds=SECONDS["start"],
        needs=[
            "images",
            *["measures"] * any(s.name == "measures" for s in stages),
            "evaluation_real_only",
            "evaluation_cal",
        ],
    )
    return stages


def _finetuning(bundles: Bundles, datalist: Path, root: Path, settings: Settings) -> list[Stage]:
    """Phantoms, which teach what edges look like, and the generator trained on with them and the cases."""
    phantoms = root / "phantoms"
    size = {"--subjects": _PHANTOMS, "--seed": 1, "--shape": "96,96,96", "--spacing_mm": 1.5}
    parts = [str(part) for pair in size.items() for part in pair]
    make = ["-m", "custom.phantom", "make", "--output_dir", str(phantoms), *parts, "--workers", str(settings.workers)]
    options = {
        "datalists": [str(datalist), str(phantoms / "datalist.json")],
        "pretrained": bundles.generator / "models/model.pt",
        "max_epochs": settings.finetune,
        "moments_epochs": 0,
        "warmup_epochs": min(1, settings.finetune - 1),
        "learning_rate": 0.0005,
        "output_dir": root / "generator/training",
        "ckpt_dir": root / "generator/models",
        "seed": settings.seed,
    }
    return [
        Stage(
            "phantoms",
            f"{_PHANTOMS} phantoms",
            make,
            phantoms / "datalist.json",
            SECONDS["start"] + SECONDS["phantom"] * _PHANTOMS / max(1, settings.workers),
            share=_counted("images/*.nii.gz", phantoms, _PHANTOMS),
        ),
        Stage(
            "generator",
            f"the generator trained on with the cases and phantoms, {settings.finetune} epochs",
            bundles.command(bundles.generator, "training", ["train.json"], options),
            root / "generator/models/model.pt",
            SECONDS["start"] + SECONDS["generator step"] * 64 * settings.finetune,
            ["phantoms"],
            trained,
        ),
    ]


def _epochs(epochs: int) -> dict[str, Any]:
    return {"max_epochs": epochs, "val_interval": min(_VAL_INTERVAL, epochs)}


def _training_seconds(epochs: int) -> float:
    steps, validations = epochs * _SAMPLES / _BATCH, epochs / _VAL_INTERVAL
    return SECONDS["start"] + SECONDS["step"] * steps + SECONDS["validation"] * validations
