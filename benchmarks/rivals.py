"""Ways to render a CT from a mask and a template, trained at equal compute on the same phantoms.

    python -m custom.phantom make --output_dir runs/phantoms --subjects 100 --shape 96,96,96 --spacing_mm 1.5
    for arm in concat controlnet spade; do
        python benchmarks/rivals.py train --arm $arm --dataset_dir runs/phantoms --work_dir runs/rivals --steps 20000
    done
    python benchmarks/rivals.py evaluate --dataset_dir runs/phantoms --work_dir runs/rivals --ours model.pt

The arms are MONAI's nets (`benchmarks/rival_networks.py`); our network is trained by its bundle for as many FLOPs. All
learn the structure of the same pairs, and get the grain of the template afterwards, as ours does. What is finished lies
in `work_dir`; a training that was stopped goes on where it last saved.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from common import ANATOMY, PICTURES, RESULTS, ROOT, TRAIN_CONFIG, machine
from custom.runs.files import write_json
from custom.runs.weights import save_atomically
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.transforms import Compose
from monai.utils import set_determinism
from rival_networks import ARMS, step_flops, velocity_loss
from torch.utils.data import RandomSampler

logger = logging.getLogger(__name__)

PAIR = {"image": torch.float32, "template_image": torch.float32, "label": torch.uint8, "template_label": torch.uint8}
WARM_UP_STEPS, END_LEARNING_RATE, EMA_MOMENTUM, CLIP_NORM = 200, 0.02, 0.002, 1.0  # the last three as in train.json
KEPT_PAIRS, FIRST_BATCHES = 1024, 8
LOG_EVERY, SAVE_EVERY = 100, 1000


class Pairs(Dataset):
    """Training pairs (target, template) of one subject each, made as `train.json` makes them.

    What is read and split of a case is kept in a file, which several trainings share.

    Args:
        dataset_dir: with `datalist.json`.
        folder: of the files.
        limit: so many cases; None takes all.
    """

    def __init__(self, dataset_dir: str, folder: Path, limit: int | None) -> None:
        parser = ConfigParser()
        parser.read_config(str(TRAIN_CONFIG))
        parser.update({"bundle_root": str(TRAIN_CONFIG.parent.parent), "dataset_dir": dataset_dir})
        parser.parse()
        read, split, indices, draw = (
            parser.get_parsed_content(name) for name in ("read", "split", "train#indices", "train#random_transforms")
        )
        self.prepare, self.folder = Compose([*read, *split, indices]), folder
        # The last paints the prior, which is ours alone.
        super().__init__(parser.get_parsed_content("train#data")[:limit], Compose(draw[:-1]))
        folder.mkdir(parents=True, exist_ok=True)

    def _transform(self, index: int) -> dict[str, torch.Tensor]:
        path = self.folder / f"{self.data[index]['case']}.pt"
        if not path.exists():
            item = self.prepare(self.data[index])
            keys = ("image", "label", "statistics", "label_cls_indices")
            save_atomically({key: _plain(item[key]) for key in keys}, path)
        (pair,) = self.transform(torch.load(path, weights_only=True, mmap=True))  # of one crop
        volumes = {key: _plain(pair[key]) for key in PAIR}
        return {key: (volumes[key].round() if "label" in key else volumes[key]).to(kind) for key, kind in PAIR.items()}


def _plain(value: Any) -> Any:
    """Without what MONAI knows of it."""
    if isinstance(value, Sequence):
        return [_plain(part) for part in value]
    return torch.as_tensor(value).as_subclass(torch.Tensor).clone()


class Pool:
    """The last pairs that were made, on the device, to draw batches from.

    Args:
        capacity: so many pairs.
        device: of them.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.kept: dict[str, torch.Tensor] = {}
        self.added = 0

    def add(self, batch: dict[str, torch.Tensor]) -> None:
        """Put pairs in the place of the oldest."""
        for key, values in batch.items():
            if key not in self.kept:
                self.kept[key] = torch.empty(self.capacity, *values.shape[1:], dtype=values.dtype, device=self.device)
            where = (self.added + torch.arange(len(values))) % self.capacity
            self.kept[key][where.to(self.device)] = values.to(self.device, non_blocking=True)
        self.added += len(next(iter(batch.values())))

    def draw(self, count: int) -> dict[str, torch.Tensor]:
        """A batch, each pair as likely."""
        chosen = torch.randint(min(self.added, self.capacity), (count,), device=self.device)
        return {key: values[chosen] for key, values in self.kept.items()}


def batches_of(pairs: Pairs, batch_size: int, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of new pairs without end."""
    sampler = RandomSampler(pairs, replacement=True, num_samples=1 << 40)
    yield from DataLoader(pairs, batch_size=batch_size, sampler=sampler, num_workers=num_workers)


class Average:
    """Moving average of weights over a growing window, as `custom.runs.WeightAverage`."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.model = copy.deepcopy(network).requires_grad_(False)
        self.pairs = list(zip(self.model.parameters(), network.parameters(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the network after a step, counted from 1."""
        own, new = (list(values) for values in zip(*self.pairs, strict=True))
        torch._foreach_lerp_(own, new, max(EMA_MOMENTUM, 10 / (10 + step)))


def rate_at(step: int, progress: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine with the share of the training that is done."""
    cosine = END_LEARNING_RATE + (1 - END_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cosine * min(1.0, (step + 1) / WARM_UP_STEPS)


class Training:
    """Training of one arm, in stages of equal length, which can be stopped and taken up again.

    Args:
        arm: of ARMS.
        steps, seconds: the training ends with the first that is reached.
        learning_rate: of AdamW.
        state: file to go on from.
        device: where to train.
    """

    def __init__(self, arm: str, *, steps: int, seconds: float, learning_rate: float, state: Path, device: str) -> None:
        self.arm, self.network = arm, ARMS[arm]().to(device).train()
        self.steps, self.seconds = steps // self.network.stages, seconds / self.network.stages
        self.learning_rate, self.state = learning_rate, state
        self.done: dict[str, Any] = {"stage": 0, "pairs": 0, "steps": [], "seconds": [], "flops": [], "losses": []}
        kept = torch.load(state, map_location="cpu", weights_only=True) if state.exists() else None
        if kept is not None:
            self.done = kept["done"]
        self.earlier_pairs = self.done["pairs"]
        self._begin()
        if kept is not None:
            self.network.load_state_dict(kept["network"])
            self.average.model.load_state_dict(kept["average"])
            self.optimizer.load_state_dict(kept["optimizer"])
            logger.info("%s: goes on from %s", arm, self.done["steps"])

    def _begin(self) -> None:
        weights = self.network.begin(self.done["stage"])
        self.optimizer = torch.optim.AdamW(weights, lr=self.learning_rate)
        self.average = Average(self.network)
        for key in ("steps", "seconds", "losses"):
            if len(self.done[key]) <= self.done["stage"]:
                self.done[key].append([] if key == "losses" else 0)

    def save(self) -> None:
        """Write what it takes to go on."""
        parts = {"network": self.network, "average": self.average.model, "optimizer": self.optimizer}
        save_atomically({"done": self.done, **{k: v.state_dict() for k, v in parts.items()}}, self.state)

    def run(self, pool: Pool, fresh: Iterator[dict[str, torch.Tensor]], batch_size: int, reuse: int) -> None:
        """Train to the end."""
        for _ in range(FIRST_BATCHES):
            pool.add(next(fresh))
        while True:
            if len(self.done["flops"]) <= self.done["stage"]:
                self.done["flops"].append(step_flops(self.network, pool.draw(batch_size)))
            self._run_stage(pool, fresh, batch_size, reuse)
            if self.done["stage"] + 1 == self.network.stages:
                return
            self.network.load_state_dict(self.average.model.state_dict())
            self.done["stage"] += 1
            self._begin()

    def _run_stage(self, pool: Pool, fresh: Iterator[dict[str, torch.Tensor]], batch_size: int, reuse: int) -> None:
        stage, losses = self.done["stage"], []
        step, before, start = self.done["steps"][stage], self.done["seconds"][stage], time.perf_counter()
        progress = max(step / self.steps, before / self.seconds)
        while progress < 1:
            if step % reuse == 0:
                pool.add(next(fresh))
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * rate_at(step, progress)
            loss = velocity_loss(self.network, pool.draw(batch_size))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], CLIP_NORM)
            self.optimizer.step()
            step += 1
            self.average.update(step)
            losses.append(loss.detach())
            seconds = before + time.perf_counter() - start
            progress = max(step / self.steps, seconds / self.seconds)
            if step % LOG_EVERY == 0 or progress >= 1:
                self.done["losses"][stage].append(float(torch.stack(losses).mean()))
                self.done["steps"][stage], self.done["seconds"][stage] = step, seconds
                self.done["pairs"] = self.earlier_pairs + pool.added
                logger.info(
                    "%s stage %d step %d, %.0f s, %d pairs: loss %.4f",
                    self.arm,
                    stage,
                    step,
                    seconds,
                    self.done["pairs"],
                    self.done["losses"][stage][-1],
                )
                losses = []
            if step % SAVE_EVERY == 0:
                self.save()


def train(
    arm: str,
    dataset_dir: str,
    work_dir: str = str(ROOT / "runs/rivals"),
    steps: int = 20000,
    batch_size: int = 4,
    num_workers: int = 0,
    device: str = "cuda:0" if torch.cuda.is_available() else "cpu",
    minutes: float = math.inf,
    reuse: int = 4,
    learning_rate: float = 0.002,
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Train one arm; writes `<arm>.pt` to `work_dir`, and goes on from what is there.

    Args:
        arm: concat, controlnet or spade.
        dataset_dir: of the phantoms.
        work_dir: of weights and prepared cases; the arms may share it at the same time.
        steps: of training; the two stages of controlnet share them.
        batch_size: crops of 32^3.
        num_workers: processes that make pairs.
        device: where to train.
        minutes: the training ends, with its learning rate, by then; steps may end it earlier.
        reuse: training steps for each batch of new pairs.
        learning_rate: of AdamW.
        limit: so many training cases, for a trial.
        seed: of weights, pairs and noise.
    """
    if arm not in ARMS:
        raise ValueError(f"arm: must be one of {list(ARMS)}, got {arm!r}")
    work = Path(work_dir)
    result = work / f"{arm}.pt"
    if result.exists():
        logger.info("%s: trained already", result)
        return
    set_determinism(seed)
    pairs = Pairs(dataset_dir, work / "cases", limit)
    options = {"steps": steps, "seconds": 60 * minutes, "learning_rate": learning_rate, "device": device}
    training = Training(arm, state=work / f"{arm}_state.pt", **options)
    set_determinism(seed + sum(training.done["steps"]))
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    pool = Pool(KEPT_PAIRS, torch.device(device))
    training.run(pool, batches_of(pairs, batch_size, num_workers), batch_size, reuse)
    weights = {name: value.cpu() for name, value in training.average.model.state_dict().items()}
    save_atomically({"weights": weights, "arm": arm, "batch_size": batch_size, **training.done}, result)
    training.state.unlink(missing_ok=True)
    logger.info("%s: written", result)


def _training_record(path: Path) -> dict[str, Any]:
    """What a training says of itself, without the weights."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    stages = zip(content["steps"], content["flops"], strict=True)
    total = sum(steps * flops["step"] for steps, flops in stages)
    return {**{k: v for k, v in content.items() if k not in ("weights", "arm")}, "total_flops": total}


def evaluate(
    dataset_dir: str,
    work_dir: str = str(ROOT / "runs/rivals"),
    ours: str | None = None,
    shipped: str | None = None,
    cases: int = 12,
    reference: int = 30,
    steps: int = 20,
    window: int | None = None,
    our_steps: int = 10,
    auc: bool = True,
    device: str = "cuda:0" if torch.cuda.is_available() else "cpu",
    out: str = str(RESULTS / "rivals.json"),
    picture: str = str(PICTURES / "rivals.png"),
) -> None:
    """Render held-out masks in templates of other subjects with all arms; print the table, write JSON and a picture.

    Args:
        dataset_dir: of the phantoms.
        work_dir: with the weights that `train` wrote; rendered volumes are kept there.
        ours, shipped: weights of our network; None leaves it out.
        cases: held-out masks.
        reference: training cases that all sets are compared with.
        steps: of DDIM, for the rivals.
        window: voxels a side of the rivals' windows; None lets them see whole volumes, as ours.
        our_steps: of our sampler.
        auc: whether to train the networks of the two-sample test as well, minutes an arm without a GPU.
        device: where to render.
        out: JSON file.
        picture: PNG of the first case, all arms below one another.
    """
    from custom.volumes.pictures import save_sheet  # the machines of a training need neither matplotlib
    from rival_evaluation import World, arms, compare  # nor MLflow, which `custom.evaluation` imports

    work = Path(work_dir)
    how = {"steps": steps, "window": window, "our_steps": our_steps, "device": device}
    renders = arms(work, {"ours": ours, "shipped": shipped}, **how)
    world = World(dataset_dir, work / "targets")
    table, sheet = compare(world, renders, work / "rendered", cases=cases, reference=reference, auc=auc)
    settings = {"cases": cases, "reference": reference, **how}
    training = {name: _training_record(work / f"{name}.pt") for name in ARMS if name in renders}
    write_json(Path(out), {"machine": machine(), **settings, "training": training, "arms": table})
    save_sheet(picture, sheet, vessel_labels=ANATOMY.thin)
    columns = list(table["painted"])
    print("| arm | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.3g}" if c in row else "" for c in columns) + " |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire({"train": train, "evaluate": evaluate})
