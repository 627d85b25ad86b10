"""What does each part of the guidance buy at equal training compute? Held-out phantoms, every arm with several seeds.

    python -m custom.phantom make --output_dir runs/phantoms72 --subjects 30 --shape 72,72,72 --spacing_mm 2.0
    python benchmarks/template_guidance.py --dataset_dir runs/phantoms72

Every finished (arm, seed) is cached under `work_dir`, so a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fire
import numpy as np
import torch
from common import ANATOMY, RESULTS, ROOT, TRAIN_CONFIG, machine, template_chain
from custom.diffusion import network as network_module
from custom.diffusion import sampler, training
from custom.diffusion.context import RESIDUAL_UNIT_HU
from custom.diffusion.grain import AddGraind
from custom.diffusion.pairs import RandTemplatePaird
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.transforms import PaintPriord
from custom.evaluation.rendering import MEASURES, Rendering, texture_correlation
from custom.phantom.cohort import make_subject
from custom.runs.files import write_json
from custom.volumes.pictures import save_sheet
from monai.bundle import ConfigParser
from monai.utils import set_determinism

logger = logging.getLogger(__name__)

CHAMBERS, VESSEL = [2, 3, 4, 5], [9]
TEST_SEED = 20_000  # far from the seeds of any training cohort
COLUMNS = {
    "chamber_hu": ("label_mean_error", CHAMBERS),
    "vessel_hu": ("label_mean_error", VESSEL),
    "vessel_cl_dice": ("vessel_cl_dice", VESSEL),
    "vessel_contrast": ("vessel_contrast_ratio", VESSEL),
    "noise_ratio": ("grain_ratio", [2, 3, 4, 5, 6]),
    "heart_mae": ("mean_absolute_error", list(range(1, 11))),
    "background_mae": ("mean_absolute_error", [0]),
}
# Without a prior the network diffuses the whole image, whose spread is about four times that of a residual.
NO_PRIOR = {"use_prior": False, "residual_unit_hu": 400.0}
STRENGTHS = {"": 1.0, ", mean": 0.0}  # what is appended to the name of an arm, and its `sample_strength`
ARMS: dict[str, dict[str, Any]] = {
    "mask only": {"mode_prob": [0.0, 1.0, 0.0], **NO_PRIOR},
    "+ template inputs": NO_PRIOR,
    "+ prior (default)": {},
    "- thin-label weight": {"thin_weight": 1.0},
    "- edge weight": {"edge_weight": 1.0},
    "templates of other subjects": {"other_subject": True},
}


@contextmanager
def residual_unit(arm: dict[str, Any]) -> Iterator[None]:
    """The unit of the residual, where it is made and where it is undone, is that of an arm; else it is a constant."""
    unit = arm.get("residual_unit_hu", RESIDUAL_UNIT_HU)
    with ExitStack() as stack:
        for module in (training, sampler, network_module):
            stack.enter_context(mock.patch.object(module, "RESIDUAL_UNIT_HU", unit))
        yield


class OtherSubject:
    """Replace the template of a pair by that of another subject, and let the prior follow it."""

    def __init__(self, pair: RandTemplatePaird, pool: list[dict[str, Any]]) -> None:
        self.pair, self.pool = pair, pool

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        other = self.pair(random.choice(self.pool))
        keys = ("template_image", "template_label", "statistics")
        return {**item, **{key: other[key] for key in keys}}


def build(dataset_dir: str, work_dir: Path, steps: int, seed: int, overrides: dict[str, Any]) -> ConfigParser:
    """The shipped training config at benchmark size, without logging and validation."""
    parser = ConfigParser()
    parser.read_config(str(TRAIN_CONFIG))
    overrides = {k: v for k, v in overrides.items() if k not in ("other_subject", "residual_unit_hu")}
    small = {
        "bundle_root": str(TRAIN_CONFIG.parent.parent),
        "dataset_dir": dataset_dir,
        "output_dir": str(work_dir),
        "seed": seed,
        "spacing_mm": [2.0, 2.0, 2.0],
        "samples_per_epoch": 100,
        "pair_uses": 1,
        "max_epochs": steps // 25,
    }
    parser.update({**small, **overrides})
    kept = ("existing_handler", "SeedEachEpoch", "MomentsFirst", "ClipGradients", "LrScheduleHandler")
    handlers = [h for h in parser["train"]["handlers"] if h["_target_"].split(".")[-1] in kept]
    parser["train"]["handlers"] = handlers
    parser.parse()
    return parser


def train(parser: ConfigParser, arm: dict[str, Any]) -> torch.nn.Module:
    """Train one arm and return its averaged network."""
    set_determinism(parser.get_parsed_content("seed"))
    trainer = parser.get_parsed_content("train#trainer")
    if arm.get("other_subject"):
        dataset = parser.get_parsed_content("train#dataset")
        crops = [t for t in dataset.transform.transforms if type(t).__name__ == "RandCropByLabelClassesd"][0]
        pair = [t for t in dataset.transform.transforms if isinstance(t, RandTemplatePaird)][0]
        pool = _Crops(dataset, crops)
        dataset.transform.transforms = (
            *dataset.transform.transforms[:-1],
            OtherSubject(pair, pool),
            dataset.transform.transforms[-1],
        )
    trainer.run()
    return parser.get_parsed_content("ema").ema_model.eval()


class _Crops:
    """Random crops of cached subjects, as a sequence `random.choice` can draw from."""

    def __init__(self, dataset: Any, crop: Any) -> None:
        self.dataset, self.crop = dataset, crop

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {key: value for key, value in self.dataset._cache[index].items() if key != "grain"}
        return self.crop(item)[0]


def test_pairs(parser: ConfigParser, cases: int) -> list[dict[str, Any]]:
    """Held-out phantoms, each with another anatomy in the same appearance as its template, used as in inference."""
    spacing_mm = parser.get_parsed_content("spacing_mm")
    guide = template_chain([1, 2, 3, 4, 5, 6, 7])
    pairs = []
    for case in range(cases):
        target, template = (
            make_subject(TEST_SEED, index, shape=(72, 72, 72), spacing_mm=spacing_mm[0], appearance_seed=case)
            for index in (case, 1000 + case)
        )
        volumes = {
            "image": target.image,
            "label": target.label,
            "template_image": template.image,
            "template_label": template.label,
        }
        item = {key: torch.from_numpy(volume.astype(np.float32))[None] for key, volume in volumes.items()}
        pairs.append(guide({**item, "case": f"test_{case}"}))
    return pairs


def measure(rendered: np.ndarray, pair: dict[str, Any]) -> dict[str, float]:
    """All columns of one rendered case."""
    truth, label = pair["image"][0].numpy(), pair["label"][0].numpy().round().astype(np.int64)
    row = {name: MEASURES[m](Rendering(rendered, truth, label, labels)) for name, (m, labels) in COLUMNS.items()}
    row["template_copy"] = texture_correlation(rendered, pair["template_image"][0].numpy(), label == 0)
    return row


def evaluate(
    network: torch.nn.Module, pairs: list[dict[str, Any]], arm: dict[str, Any], strength: float, picture: Path
) -> dict[str, float]:
    """Mean columns over the held-out cases, rendered with a `sample_strength`; draws the first case."""
    mode = "mask_only" if arm.get("mode_prob") else "template"
    paint = PaintPriord(
        nominal_hu=ANATOMY.nominal_hu, mode=mode, thin_labels=VESSEL, use_prior=arm.get("use_prior", True)
    )
    inferer, finish = StructDiffInferer(10, sample_strength=strength), AddGraind()
    rows = []
    for pair in pairs:
        item = paint(pair)
        item["pred"] = inferer(item["context"][None], network, [pair["case"]])[0]
        rendered = finish(item)["pred"][0].numpy()
        rows.append(measure(rendered, pair))
        if len(rows) == 1:
            label = pair["label"][0].numpy()
            save_sheet(
                picture,
                [("true", pair["image"][0].numpy(), label), ("rendered", rendered, label)],
                vessel_labels=VESSEL,
            )
    return {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}


def painted(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """The no-network baseline: the prior itself with the template's grain."""
    paint, finish, rows = PaintPriord(nominal_hu=ANATOMY.nominal_hu), AddGraind("prior"), []
    for pair in pairs:
        rows.append(measure(finish(paint(pair))["prior"][0].numpy(), pair))
    return {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}


def main(
    dataset_dir: str,
    work_dir: str = str(ROOT / "runs/template_guidance"),
    steps: int = 250,
    seeds: int = 3,
    cases: int = 4,
    arms: Sequence[str] = tuple(ARMS),
) -> None:
    """Train and evaluate arms of ARMS, as full samples and as predicted means, both with the template's grain.

    Prints the table and writes benchmarks/results/template_guidance.json.
    """
    work = Path(work_dir)
    pairs = test_pairs(build(dataset_dir, work, steps, 0, {}), cases)
    truth = [measure(p["image"][0].numpy(), p) for p in pairs]
    table: dict[str, Any] = {
        "true image (ceiling)": [{k: float(np.nanmean([row[k] for row in truth])) for k in truth[0]}],
        "painted prior + grain, no network": [painted(pairs)],
    }
    for seed in range(seeds):
        for name, arm in ((name, ARMS[name]) for name in arms):
            cached = work / f"{name.replace(' ', '_')}_{seed}.json"
            if not cached.exists():
                start = time.perf_counter()
                with residual_unit(arm):
                    network = train(build(dataset_dir, work, steps, seed, arm), arm)
                    seconds = time.perf_counter() - start
                    found = {
                        suffix: evaluate(
                            network, pairs, arm, strength, cached.with_name(f"{cached.stem}{suffix[2:]}.png")
                        )
                        for suffix, strength in STRENGTHS.items()
                    }
                write_json(cached, {suffix: {**row, "seconds": seconds} for suffix, row in found.items()})
            for suffix, row in json.loads(cached.read_text()).items():
                table.setdefault(name + suffix, []).append(row)
            logger.info("%s seed %d: %s", name, seed, table[name][-1])
    summary = {
        name: {
            k: {"mean": float(np.mean([r[k] for r in rows])), "sd": float(np.std([r[k] for r in rows]))}
            for k in rows[0]
        }
        for name, rows in table.items()
    }
    write_json(
        RESULTS / "template_guidance.json",
        {"machine": machine(), "steps": steps, "seeds": seeds, "cases": cases, "summary": summary, "runs": table},
    )
    columns = [*COLUMNS, "template_copy"]
    print("| arm | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in summary.items():
        print(f"| {name} | " + " | ".join(f"{row[c]['mean']:.3g} ± {row[c]['sd']:.2g}" for c in columns) + " |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("ignite").setLevel(logging.WARNING)
    fire.Fire(main)
