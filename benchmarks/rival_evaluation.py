"""What the arms of `benchmarks/rivals.py` are asked: held-out masks in templates of other subjects, and the measures.

Apart from the training, which imports nothing of this.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import ANATOMY, TRAIN_CONFIG, template_chain
from custom.diffusion.grain import AddGraind
from custom.diffusion.noise import HU_RANGE, case_noise
from custom.diffusion.painted_transforms import PaintTissuesd
from custom.diffusion.sampler import StructDiffInferer
from custom.diffusion.transforms import PaintPriord
from custom.evaluation.distances import kernel_distance, radiomic_features, standardised
from custom.evaluation.gate import ImageGate, examine_labels, examine_vessels, rejections, vessel_reference
from custom.evaluation.realism import (
    BANDS,
    draw_patches,
    edge_speckle,
    interior_spectrum,
    spectrum_ratio,
    two_sample_auc,
)
from custom.evaluation.rendering import Rendering, label_mean_error
from custom.runs.files import file_hash, replace_file
from custom.runs.weights import LoadWeights, save_atomically
from custom.volumes.cases import load_cases, with_template, with_template_names
from custom.volumes.reading import reading_chain
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd
from rival_networks import ARMS, condition_of, draw

logger = logging.getLogger(__name__)

HELD_OUT = ["validation", "test"]
CHAMBERS = [2, 3, 4, 5]
SPACING_MM = [1.5, 1.5, 1.5]  # of the phantoms
MARGIN_MM = 12.0  # around the heart, as in measure_set.json
PATCHES = 24  # of a case, as `custom.evaluation.sets` draws
Item = dict[str, Any]


def _as_it_is(item: Item) -> Item:
    return item


class Render(NamedTuple):
    """How an arm renders a target: item -> structure (1, H, W, D) in HU, and what tells its volumes from others.

    `asked` makes of an item what the arm is asked for: its own contrast and noise, where these are not the template's.
    """

    structure_of: Callable[[Item], torch.Tensor]
    mark: str
    asked: Callable[[Item], Item] = _as_it_is


class World:
    """What is asked of all arms: volumes of cases, and targets with the template of another subject.

    Args:
        dataset_dir: with `datalist.json`.
        folder: where targets are kept, whose registration takes seconds each.
    """

    def __init__(self, dataset_dir: str, folder: Path) -> None:
        self.datalist, self.folder = str(Path(dataset_dir) / "datalist.json"), folder
        self.config = ConfigParser(json.loads(TRAIN_CONFIG.read_text()))
        self.spacing_mm = SPACING_MM

    def _read(self, *pairs: Sequence[str]) -> Compose:
        mapping = self.config["label_mapping"]
        options = {"num_labels": ANATOMY.num_labels, "label_mapping": mapping, "spacing_mm": self.spacing_mm}
        return Compose(reading_chain(pairs=pairs, **options))

    def volumes(self, section: Sequence[str] | str, count: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Image in HU and label (H, W, D) of real cases."""
        read = self._read(("image", "label"))
        for case in load_cases(self.datalist, section)[:count]:
            item = read({key: case[key] for key in ("image", "label")})
            yield item["image"][0].numpy(), item["label"][0].numpy().round().astype(np.int64)

    def targets(self, count: int) -> Iterable[Item]:
        """Masks of held-out cases, each with the aligned template of the next of them, and the prior."""
        cases = load_cases(self.datalist, HELD_OUT)[:count]
        templates = with_template_names([{key: case[key] for key in ("image", "label")} for case in cases])
        make = Compose(
            [
                self._read(("image", "label"), ("template_image", "template_label")),
                template_chain(ANATOMY.aligning),
                PaintPriord(nominal_hu=ANATOMY.nominal_hu, thin_labels=ANATOMY.thin),
            ]
        )
        for case, template in zip(cases, [*templates[1:], templates[0]], strict=True):
            target = with_template(case, template)
            path = self.folder / f"{target['case']}.pt"
            if not path.exists():
                item = make(target)
                kept = {
                    key: torch.as_tensor(v).as_subclass(torch.Tensor).clone()
                    for key, v in item.items()
                    if _is_volume(v)
                }
                save_atomically({**kept, "noise_sd": float(item["noise_sd"]), "case": target["case"]}, path)
            yield torch.load(path, weights_only=True)


def _is_volume(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 1


def rival(path: Path, device: str, steps: int, window: int | None) -> Render:
    """How an arm of ARMS renders a target, with the weights that `rivals.py train` wrote."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    network = ARMS[content["arm"]]()
    network.load_state_dict(content["weights"])
    network.to(device).eval()

    def render(item: Item) -> torch.Tensor:
        noise = case_noise((1, 1, *item["label"].shape[1:]), 0, item["case"]).to(device)
        given = {key: item[key][None].to(device) for key in ("label", "template_label", "template_image")}
        return draw(network, condition_of(given), noise, steps, window)[0].clamp(*HU_RANGE)

    return Render(render, f"{steps}_{window or 'whole'}_{file_hash(str(path))[:8]}")


def structdiff(path: str, device: str, steps: int, strength: float) -> Render:
    """How our network renders a target, as inference.json does."""
    parser = ConfigParser(json.loads(TRAIN_CONFIG.read_text()))
    network = parser.get_parsed_content("network_def")
    LoadWeights(network, path)()
    network.to(device).eval()
    inferer = StructDiffInferer(steps, sample_strength=strength)
    return Render(
        lambda item: inferer(item["context"][None].to(device), network, [item["case"]])[0],
        f"{steps}_{strength:g}_{file_hash(path)[:8]}",
    )


def rendered(render: Render, item: Item, folder: Path) -> tuple[torch.Tensor, float]:
    """Structure (1, H, W, D) in HU of one target, and the seconds that it took; kept in a file."""
    path = folder / render.mark / f"{item['case']}.npz"
    if not path.exists():
        start = time.perf_counter()
        structure = render.structure_of(item).cpu().numpy()
        seconds = time.perf_counter() - start
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                np.savez(file, structure=structure, seconds=seconds)

        replace_file(path, write)
        logger.info("%s: %s, %.1f s", folder.name, item["case"], seconds)
    content = np.load(path)
    return torch.from_numpy(content["structure"]), float(content["seconds"])


class Collected:
    """What is measured of the images of a set, case by case."""

    def __init__(self, spacing_mm: Sequence[float]) -> None:
        margin = [round(MARGIN_MM / s) for s in spacing_mm]
        self.crop = CropForegroundd(["image", "label"], source_key="label", margin=margin, allow_smaller=True)
        self.features: list[np.ndarray] = []
        self.speckle: list[float] = []
        self.spectra: list[np.ndarray] = []
        self.patches: list[torch.Tensor] = []

    def add(self, image: np.ndarray, label: np.ndarray) -> None:
        """Measure one case, (H, W, D) HU and ids."""
        cropped = self.crop({"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]})
        near, ids = (np.asarray(cropped[key][0]) for key in ("image", "label"))
        self.features.append(radiomic_features(near, ids, num_labels=ANATOMY.num_labels))
        self.speckle.append(edge_speckle(near, ids))
        self.spectra.append(interior_spectrum(near, ids, ANATOMY.homogeneous))
        options = {"count": PATCHES, "num_labels": ANATOMY.num_labels, "seed": len(self.patches)}
        self.patches.append(draw_patches(near, ids, **options))


def realism(made: Collected, real: Collected, scale: np.ndarray, *, auc: bool) -> dict[str, float]:
    """A set compared with real cases; features are scaled by what they vary by in `scale`."""
    value, sd = kernel_distance(*(standardised(np.array(of.features), scale) for of in (made, real)))
    bands = zip(BANDS, BANDS[1:], spectrum_ratio(np.array(made.spectra), np.array(real.spectra)), strict=False)
    told = two_sample_auc(made.patches, real.patches) if auc else {"mean": float("nan"), "sd": float("nan")}
    return {
        "kernel_distance": value,
        "kernel_distance_sd_of_halves": sd,
        "edge_speckle_ratio": float(np.nanmean(made.speckle) / np.nanmean(real.speckle)),
        **{f"spectrum_{low}_{high}": ratio for low, high, ratio in bands},
        "two_sample_auc": told["mean"],
        "two_sample_auc_sd": told["sd"],
    }


def _gate() -> ImageGate:
    limits = json.loads((TRAIN_CONFIG.parent / "synthesize.json").read_text())["gate"]
    return ImageGate.from_config({**limits, "plausible_hu": ANATOMY.plausible_hu})


def fidelity(structure: torch.Tensor, item: Item, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Whether a structure shows the mask with the intensities of the template: errors of label means, and the gate."""
    label, template_label = (item[key][0].numpy().round().astype(np.int64) for key in ("label", "template_label"))
    image, template = structure[0].numpy(), item["template_image"][0].numpy()
    thin = {"thin_labels": ANATOMY.thin}
    # The statistics are of the template as it was scanned: warping takes contrast away.
    own = vessel_reference(template, template_label, spacing_mm=spacing_mm, **thin)
    own = own._replace(mean_hu=float(item["statistics"][ANATOMY.thin, 0].nanmean()))
    statistics = item["statistics"].tolist()
    measures = examine_labels(image, label, template_statistics=statistics, template_image=template, **thin)
    measures |= examine_vessels(image, label, template=own, spacing_mm=spacing_mm, **thin)
    # The prior is painted with the template's means, which the labels of the rendering are to have.
    case = partial(Rendering, image, item["prior"][0].numpy(), label)
    names = ("vessel_contrast", "vessel_continuity", "template_copy")
    return {
        "chamber_error_hu": label_mean_error(case(CHAMBERS)),
        "coronary_error_hu": label_mean_error(case(ANATOMY.thin)),
        **{name: measures[name] for name in names},
        "accepted": float(not rejections(measures, 0.0, _gate())),
    }


def randomised(item: Item) -> Item:
    """The same target, as mode "painted" of inference.json paints it; its means are those that were drawn."""
    label = MetaTensor(item["label"], affine=np.diag([*SPACING_MM, 1.0]))
    pools, thin = ANATOMY.pool, ANATOMY.thin
    paint = PaintTissuesd(
        nominal_hu=ANATOMY.nominal_hu, plausible_hu=ANATOMY.plausible_hu, pools=pools, thin_labels=thin
    )
    painted = paint({**item, "label": label})
    statistics = painted["statistics"].clone()  # nothing is held against the template but vessels, against their own
    statistics[thin, 0] = painted["drawn_hu"][thin]
    return {
        **item,
        **{key: painted[key] for key in ("noise_sd", "grain_spectrum")},
        "prior": torch.as_tensor(painted["prior"]).as_subclass(torch.Tensor),
        "statistics": statistics,
    }


def arms(
    work: Path, own: Mapping[str, str | None], *, device: str, steps: int, window: int | None, our_steps: int
) -> dict[str, Render]:
    """All that there are weights of, by name."""
    found: dict[str, Render] = {
        "painted prior": Render(lambda item: item["prior"], "prior"),
        "painted, randomised": Render(lambda item: item["prior"], "randomised", randomised),
    }
    found |= {
        name: rival(work / f"{name}.pt", device, steps, window) for name in ARMS if (work / f"{name}.pt").exists()
    }
    for name, path in own.items():
        if path is not None:
            found[name] = structdiff(path, device, our_steps, 1.0)
            found[f"{name}, mean"] = structdiff(path, device, our_steps, 0.0)
    return found


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over cases; of the seconds the median, as the first call of a GPU takes longer."""
    means = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
    return means | {"seconds": float(np.median([row["seconds"] for row in rows]))}


def compare(
    world: World, renders: Mapping[str, Render], folder: Path, *, cases: int, reference: int, auc: bool
) -> tuple[dict[str, dict[str, float]], list[tuple[str, np.ndarray, np.ndarray]]]:
    """Measure all arms, and real cases that nobody saw as the floor, against training cases.

    Returns:
        measures by arm, and of the first target what `custom.volumes.pictures.save_sheet` draws.
    """
    real, unseen = Collected(world.spacing_mm), Collected(world.spacing_mm)
    for section, count, into in (("training", reference, real), (HELD_OUT, cases, unseen)):
        for image, label in world.volumes(section, count):
            into.add(image, label)
    scale = np.array([*real.features, *unseen.features])
    table = {"real": realism(unseen, real, scale, auc=auc)}
    sheet: list[tuple[str, np.ndarray, np.ndarray]] = []
    for name, render in renders.items():
        made, rows = Collected(world.spacing_mm), []
        for target in world.targets(cases):
            start = time.perf_counter()
            item = render.asked(target)
            asked = time.perf_counter() - start
            structure, seconds = rendered(render, item, folder / name.replace(", ", "_"))
            label = item["label"][0].numpy().round().astype(np.int64)
            image = AddGraind()({**item, "pred": structure})["pred"][0].numpy()
            made.add(image, label)
            rows.append({**fidelity(structure, item, world.spacing_mm), "seconds": seconds + asked})
            if len(rows) == 1:
                if not sheet:
                    template = item["template_image"][0].numpy(), item["template_label"][0].numpy()
                    sheet += [
                        ("true", item["image"][0].numpy(), label),
                        ("template, aligned, without grain", *template),
                    ]
                sheet.append((name, image, label))
        table[name] = realism(made, real, scale, auc=auc) | _summary(rows)
        logger.info("%s: %s", name, table[name])
    return table, sheet
