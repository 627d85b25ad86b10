"""The plan of a study: all stages in their order, what each is, its command, and about how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.study.stages import ARMS, Stage, Study, trained

SECONDS = {"measuring": 12.0, "step": 1.2, "validation": 8.0, "generator step": 1.1, "phantom": 8.0, "start": 20.0}
"""Of a case, or a training step, on two cores: a first guess, which gives way to what a run measures."""
CASE_SECONDS = {
    "mask": (0.0, 0.0, 3.5),
    "rendering": (8.0, 0.2, 2.5),
    "painting": (8.0, 0.3, 0.0),
    "evaluation": (5.0, 0.3, 0.0),
}
"""Of a case: always, for a million voxels of its file, and for a million of its field of view at the spacing of new
label maps. By what cases of 256 x 256 x 256 and 512 x 512 x 275 take (docs/FINDINGS.md)."""
SYNTHESIS = ("inference.json", "synthesize.json")
_SAMPLES, _BATCH, _VAL_INTERVAL = 32, 2, 5  # of the segmenter's train.json
_FURTHER_LEARNING_RATE = 0.002  # half of that from nothing
_PHANTOMS = 40


def _case_seconds(study: Study, what: str) -> float:
    once, of_file, of_field = CASE_SECONDS[what]
    return once + of_file * study.megavoxels + of_field * study.field_ml / study.settings.spacing_mm**3 / 1000


def _counted(pattern: str, root: Path, total: int) -> Callable[[Path], float | None]:
    return lambda log: min(1.0, len(list(root.glob(pattern))) / total)


def plan(study: Study) -> list[Stage]:
    """All stages of a study."""
    return [*_masks(study), *_finetuning(study), *_images(study), *_segmenters(study), *_comparison(study)]


def _masks(study: Study) -> list[Stage]:
    settings, references = study.settings, study.sizes["training"]
    options = {
        "reference_datalist": study.datalist,
        "count": settings.count,
        "spacing_mm": [settings.spacing_mm] * 3,
        "workers": settings.workers,
        "output_dir": study.root / "masks",
    }
    return [
        study.stage(
            "masks",
            f"{settings.count} new label maps from {references} cases",
            (study.bundles.generator, "generating", ["generate_masks.json"]),
            options,
            product="masks/datalist.json",
            seconds=SECONDS["start"]
            + _case_seconds(study, "mask") * (settings.count + references) / max(1, settings.workers),
            share=_counted("records/*.json", study.root / "masks", settings.count),
        )
    ]


def _finetuning(study: Study) -> list[Stage]:
    """Phantoms, which teach what edges look like, and the generator trained on with them and the cases."""
    settings, phantoms, generator = study.settings, study.root / "phantoms", study.bundles.generator
    if not settings.finetune:
        return []
    size = {"--subjects": _PHANTOMS, "--seed": 1, "--shape": "96,96,96", "--spacing_mm": 1.5}
    parts = [str(part) for pair in size.items() for part in pair]
    make = ["-m", "custom.phantom", "make", "--output_dir", str(phantoms), *parts, "--workers", str(settings.workers)]
    made = Stage(
        "phantoms",
        f"{_PHANTOMS} phantoms",
        make,
        phantoms / "datalist.json",
        SECONDS["start"] + SECONDS["phantom"] * _PHANTOMS / max(1, settings.workers),
        share=_counted("images/*.nii.gz", phantoms, _PHANTOMS),
    )
    options = {
        "datalists": [str(study.datalist), str(phantoms / "datalist.json")],
        "pretrained": generator / "models/model.pt",
        "max_epochs": settings.finetune,
        "moments_epochs": 0,
        "warmup_epochs": min(1, settings.finetune - 1),
        "learning_rate": 0.0005,
        "output_dir": study.root / "generator/training",
        "ckpt_dir": study.root / "generator/models",
    }
    tuned = study.stage(
        "generator",
        f"the generator trained on with the cases and phantoms, {settings.finetune} epochs",
        (generator, "training", ["train.json"]),
        options,
        product="generator/models/model.pt",
        seconds=SECONDS["start"] + SECONDS["generator step"] * 64 * settings.finetune,
        needs=["phantoms"],
        share=trained,
    )
    return [made, tuned]


def _images(study: Study) -> list[Stage]:
    """Confidence scaled where a network needs it, images made and measured."""
    settings, sizes, root, generator = study.settings, study.sizes, study.root, study.bundles.generator
    tuned = ["generator"] * bool(settings.finetune)
    templates: dict[str, Any] = {"template_datalist": study.datalist}
    if settings.is_painted:
        templates["mode"] = settings.mode
    else:
        templates["confidence_table"] = root / "confidence.json"
        templates["ckpt_dir"] = (root / "generator" if tuned else generator) / "models"
    synthetic, loading = {**templates, "output_dir": root / "synthetic"}, {"num_workers": 1}
    scaled = study.stage(
        "confidence",
        f"how far to trust an image, by {sizes['validation']} held-out case(s)",
        (generator, "calibrating", [*SYNTHESIS, "calibrate.json"]),
        {**templates, **loading},
        product="confidence.json",
        seconds=SECONDS["start"] + _case_seconds(study, "rendering") * sizes["training"] * sizes["validation"],
        needs=tuned,
    )
    calibrated = [scaled] * (not settings.is_painted)
    each = _case_seconds(study, "painting" if settings.is_painted else "rendering")
    made = study.stage(
        "images",
        f"an image and a confidence map of each of the {settings.count} label maps",
        (generator, "synthesizing", SYNTHESIS),
        {**synthetic, **loading, "mask_datalist": root / "masks/datalist.json"},
        product="synthetic/datalist.json",
        seconds=SECONDS["start"] + each * settings.count,
        needs=["masks", *[stage.name for stage in calibrated], *tuned],
        share=_counted("records/*.json", root / "synthetic", settings.count),
    )
    measured = study.stage(
        "measures",
        "the set beside real cases: realism, diversity, copies",
        (generator, "measuring", [*SYNTHESIS, "measure_set.json"]),
        synthetic,
        product="synthetic/set_metrics.json",
        seconds=SECONDS["start"] + SECONDS["measuring"] * (settings.count + sum(sizes.values())),
        needs=["images"],
    )
    return [*calibrated, made, *[measured] * _can_be_measured(study)]


def _can_be_measured(study: Study) -> bool:
    """Whether there are two cases on either side, which a set is compared with."""
    return study.sizes["training"] > 1 and study.sizes["validation"] + study.sizes["test"] > 1


def _segmenters(study: Study) -> list[Stage]:
    """One pre-trained on the set and fine-tuned, one of real cases alone, of as many epochs, both from one start."""
    epochs, cases = study.settings.epochs, {"datalists": [str(study.datalist)]}
    early, late = 2 * epochs // 3, epochs - 2 * epochs // 3
    further: dict[str, Any] = {"learning_rate": _FURTHER_LEARNING_RATE}
    start = {} if study.shipped is None else {"pretrained": str(study.shipped), **further}
    begun = "from nothing" if study.shipped is None else "from the shipped weights"

    def training(
        name: str, title: str, epochs: int, arm: str, folder: str, more: Mapping[str, Any], needs: Sequence[str] = ()
    ) -> Stage:
        early = name == "pretraining"
        places = {"output_dir": study.root / arm / folder, "ckpt_dir": study.root / arm / "models"}
        return study.stage(
            name,
            f"{title}, {epochs} epochs",
            (
                study.bundles.segmenter,
                "pretraining" if early else "training",
                ["train.json", *["pretrain.json"] * early],
            ),
            {**cases, "max_epochs": epochs, "val_interval": min(_VAL_INTERVAL, epochs), **more, **places},
            product=f"{arm}/models/{'pretrained' if early else 'model'}.pt",
            seconds=_training_seconds(epochs),
            needs=needs,
            share=trained,
        )

    learned = {
        "synthetic_datalists": [str(study.root / "synthetic/datalist.json")],
        "real_datalists": [str(study.datalist)],
        "warmup_epochs": early // 10,
        "ramp_epochs": early // 5,
        **start,
    }
    title = f"a segmenter, {begun}, pre-trained on the set, trusting it as far as it should (CAL)"
    return [
        training("pretraining", title, early, "cal", "pretraining", learned, ["images"]),
        training(
            "finetuning", "the same, fine-tuned on the real cases", late, "cal", "training", further, ["pretraining"]
        ),
        training(
            "real_only",
            f"a segmenter, {begun}, of real cases alone, to compare with",
            epochs,
            "real_only",
            "training",
            start,
        ),
    ]


def _comparison(study: Study) -> list[Stage]:
    """Both segmenters and what they started from on the test cases, and the report."""
    root, tests = study.root, study.sizes["test"]

    def evaluation(arm: str, *needed: str, weights: Path | None = None) -> Stage:
        places = {"output_dir": root / arm / "evaluation", "ckpt_dir": weights or root / arm / "models"}
        return study.stage(
            f"evaluation_{arm}",
            f"{arm} on {tests} test case(s)",
            (study.bundles.segmenter, "evaluating", ["train.json", "evaluate.json"]),
            {"datalists": [str(study.datalist)], **places},
            product=f"{arm}/evaluation/labels.csv",
            seconds=SECONDS["start"] + _case_seconds(study, "evaluation") * tests,
            needs=needed,
        )

    evaluated = [evaluation("real_only", "real_only"), evaluation("cal", "finetuning")]
    if study.shipped is not None:
        evaluated.append(evaluation("shipped", weights=study.shipped.parent))
    arms = {name: arm for name, arm in ARMS.items() if arm != "shipped" or study.shipped is not None}
    compared = {name: str(root / arm / "evaluation") for name, arm in arms.items()}
    report = study.stage(
        "report",
        "all segmenters and the set on one page",
        (study.bundles.generator, "reporting", SYNTHESIS),
        {"output_dir": root / "synthetic", "evaluations": compared},
        product="synthetic/report.html",
        seconds=SECONDS["start"],
        needs=["images", *["measures"] * _can_be_measured(study), *[stage.name for stage in evaluated]],
    )
    return [*evaluated, report]


def _training_seconds(epochs: int) -> float:
    steps, validations = epochs * _SAMPLES / _BATCH, epochs / _VAL_INTERVAL
    return SECONDS["start"] + SECONDS["step"] * steps + SECONDS["validation"] * validations
