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

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from common import ANATOMY, PICTURES, RESULTS, ROOT, TRAIN_CONFIG, machine
from custom.diffusion.pairs import PooledDataLoader
from custom.runs.files import write_json
from custom.runs.memory import keep_freed_memory
from custom.runs.weights import WeightAverage, save_atomically
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose
from monai.utils import set_determinism
from rival_networks import ARMS, step_flops, velocity_loss
from torch.utils.data import RandomSampler

logger = logging.getLogger(__name__)

PAIR = ("image", "template_image", "label", "template_label")
WARM_UP_STEPS, END_LEARNING_RATE, EMA_MOMENTUM, CLIP_NORM = 200, 0.02, 0.002, 1.0  # the last three as in train.json
KEPT_PAIRS = 1024
LOG_EVERY, SAVE_EVERY = 100, 100


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
            save_atomically({key: _plain(item[key]) for key in keys} | {"affine": item["label"].affine}, path)
        item = torch.load(path, weights_only=True, mmap=True)
        item["label"] = MetaTensor(item["label"], affine=item.pop("affine"))  # whose spacing the pair follows
        (pair,) = self.transform(item)  # of one crop
        return {key: _plain(pair[key]) for key in PAIR}


def _plain(value: Any) -> Any:
    """Without what MONAI knows of it."""
    if isinstance(value, Sequence):
        return [_plain(part) for part in value]
    return torch.as_tensor(value).as_subclass(torch.Tensor).clone()


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
        # Channels last: on a CPU three quarters of the time a step.
        network = ARMS[arm]().to(device, memory_format=torch.channels_last_3d)
        self.arm, self.network = arm, network.train()
        self.steps, self.seconds = steps // self.network.stages, seconds / self.network.stages
        self.learning_rate, self.state = learning_rate, state
        self.done: dict[str, Any] = {"stage": 0, "steps": [], "seconds": [], "flops": [], "losses": []}
        kept = torch.load(state, map_location="cpu", weights_only=True) if state.exists() else None
        if kept is not None:
            self.done = kept["done"]
        self._begin()
        if kept is not None:
            self.network.load_state_dict(kept["network"])
            self.average.ema_model.load_state_dict(kept["average"])
            self.optimizer.load_state_dict(kept["optimizer"])
            logger.info("%s: goes on from %s", arm, self.done["steps"])

    def _begin(self) -> None:
        weights = self.network.begin(self.done["stage"])
        self.optimizer = torch.optim.AdamW(weights, lr=self.learning_rate)
        self.average = WeightAverage(self.network, momentum=EMA_MOMENTUM)
        for key in ("steps", "seconds", "losses"):
            if len(self.done[key]) <= self.done["stage"]:
                self.done[key].append([] if key == "losses" else 0)

    def save(self) -> None:
        """Write what it takes to go on."""
        parts = {"network": self.network, "average": self.average.ema_model, "optimizer": self.optimizer}
        save_atomically({"done": self.done, **{k: v.state_dict() for k, v in parts.items()}}, self.state)

    def run(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """Train to the end."""
        while True:
            if len(self.done["flops"]) <= self.done["stage"]:
                self.done["flops"].append(step_flops(self.network, next(batches)))
            self._run_stage(batches)
            if self.done["stage"] + 1 == self.network.stages:
                return
            self.network.load_state_dict(self.average.ema_model.state_dict())
            self.done["stage"] += 1
            self._begin()

    def _run_stage(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        stage, losses = self.done["stage"], []
        first, before, start = self.done["steps"][stage], self.done["seconds"][stage], time.perf_counter()

        def elapsed() -> float:
            return float(before + time.perf_counter() - start)

        def progress(steps: int) -> float:
            return max(steps / self.steps, elapsed() / self.seconds)

        def train_step(engine: Engine, batch: dict[str, torch.Tensor]) -> None:
            step = engine.state.iteration - 1
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * rate_at(step, progress(step))
            loss = velocity_loss(self.network, batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], CLIP_NORM)
            self.optimizer.step()
            losses.append(loss.detach())

        def note(engine: Engine) -> None:
            step = engine.state.iteration
            ends = progress(step) >= 1
            if step % LOG_EVERY == 0 or ends:
                self.done["losses"][stage].append(float(torch.stack(losses).mean()))
                self.done["steps"][stage], self.done["seconds"][stage] = step, elapsed()
                values = self.arm, stage, step, self.done["seconds"][stage], self.done["losses"][stage][-1]
                logger.info("%s stage %d step %d, %.0f s: loss %.4f", *values)
                losses.clear()
            if step % SAVE_EVERY == 0:
                self.save()
            if ends:
                engine.terminate()

        if max(first / self.steps, before / self.seconds) < 1:
            engine = Engine(train_step)
            self.average.attach(engine, event=Events.ITERATION_COMPLETED)
            engine.add_event_handler(Events.ITERATION_COMPLETED, note)
            engine.load_state_dict({"iteration": first, "max_epochs": 1, "epoch_length": self.steps})
            engine.run(batches)


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
    keep_freed_memory()  # as every run of a bundle
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
    sampler = RandomSampler(pairs, replacement=True, num_samples=1 << 40)  # without end
    options = {"uses": reuse, "kept": KEPT_PAIRS, "keys": PAIR, "device": device, "num_workers": num_workers}
    training.run(iter(PooledDataLoader(pairs, batch_size=batch_size, sampler=sampler, **options)))
    weights = {name: value.cpu() for name, value in training.average.ema_model.state_dict().items()}
    done = {**training.done, "pairs": batch_size * math.ceil(sum(training.done["steps"]) / reuse)}
    save_atomically({"weights": weights, "arm": arm, "batch_size": batch_size, **done}, result)
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
    columns = list(table["painted prior"])
    print("| arm | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.3g}" if c in row else "" for c in columns) + " |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire({"train": train, "evaluate": evaluate})
