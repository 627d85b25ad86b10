"""Does it help the coarse stage that each Haar band is diffused by its own variance? One network, two ways, same steps.

    python benchmarks/coarse_bands.py --dataset_dir runs/wide

Both arms see the same pairs, noise and times. Measured is the squared error of the velocity on held-out phantoms, of
the coarse band and of the seven finer ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from common import RESULTS, TRAIN_CONFIG, machine
from custom.diffusion.coarse import CoarseUNet
from custom.diffusion.formulas import amplitudes
from custom.runs.files import write_json
from custom.volumes.haar import haar_pack, haar_unpack
from monai.bundle import ConfigParser

logger = logging.getLogger(__name__)
Pairs = tuple[torch.Tensor, torch.Tensor]


class PlainUNet(CoarseUNet):
    """The same network, asked for the velocity as it is."""

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor | None = None, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As of the coarse stage."""
        assert timesteps is not None
        assert context is not None
        return haar_unpack(self.flow(haar_pack(x), timesteps, haar_pack(context)))


ARMS: Mapping[str, type[CoarseUNet]] = {"each band by its variance": CoarseUNet, "velocity as it is": PlainUNet}


def _pairs(parser: ConfigParser, section: str, count: int, seed: int) -> Pairs:
    """Images and contexts of so many pairs, by the transforms of the training."""
    dataset = parser.get_parsed_content(f"{section}#dataset")
    parser.get_parsed_content(f"{section}#preprocessing").set_random_state(seed=seed)
    order = torch.randint(len(dataset), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    items = [dataset[k] for k in order]
    image, context = (torch.stack([torch.as_tensor(item[key]) for item in items]) for key in ("image", "context"))
    return image.as_subclass(torch.Tensor), context.as_subclass(torch.Tensor)


def _noisy(network: CoarseUNet, image: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy images, times, velocities."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator)
    times = torch.randint(0, 1000, (len(image),), generator=generator)
    a, s = amplitudes(network.alphas_cumprod, times, image.ndim)
    return a * image + s * noise, times, a * noise - s * image


@torch.no_grad()
def _errors(network: CoarseUNet, pairs: Pairs) -> dict[str, float]:
    noisy, times, velocity = _noisy(network.eval(), pairs[0], seed=1 << 30)  # of no training step
    parts = zip(noisy.split(8), times.split(8), pairs[1].split(8), velocity.split(8), strict=True)
    squares = torch.cat([haar_pack(network(x, t, c) - v).square().mean((2, 3, 4)) for x, t, c, v in parts]).mean(0)
    return {"all": float(squares.mean()), "coarse band": float(squares[0]), "finer bands": float(squares[1:].mean())}


def _train(arm: type[CoarseUNet], pairs: Pairs, steps: int, batch: int, learning_rate: float) -> CoarseUNet:
    torch.manual_seed(0)
    network = arm().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average)
    for step in range(steps):
        rows = torch.randint(len(pairs[0]), (batch,), generator=torch.Generator().manual_seed(step))
        noisy, times, velocity = _noisy(network, pairs[0][rows], seed=step)
        optimizer.zero_grad()
        (network(noisy, times, pairs[1][rows]) - velocity).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
    return averaged.module


def run(
    dataset_dir: str,
    steps: int = 240,
    batch: int = 4,
    learning_rate: float = 0.001,
    pairs: int = 512,
    held_out: int = 96,
    spacing_mm: Sequence[float] = (2.5, 2.5),
    out: str = str(RESULTS / "coarse_bands.json"),
) -> None:
    """Train both arms and print and write their errors.

    Args:
        dataset_dir: phantoms of at least 192 mm, with "training" and "validation".
        steps, batch, learning_rate: of both trainings.
        pairs, held_out: made of training and validation cases.
        spacing_mm: at which the phantoms are read.
        out: file to write.
    """
    parser = ConfigParser()
    parser.read_config([TRAIN_CONFIG, TRAIN_CONFIG.with_name("train_coarse.json")])
    parser.read_meta(TRAIN_CONFIG.with_name("metadata.json"))
    places = {"dataset_dir": dataset_dir, "spacing_mm": list(spacing_mm), "val_interval": 1, "val_cases": None}
    for name, value in places.items():
        parser[name] = value
    learned, unseen = _pairs(parser, "train", pairs, 0), _pairs(parser, "validate", held_out, 1)
    table: dict[str, Any] = {}
    for name, arm in ARMS.items():
        start = time.monotonic()
        network = _train(arm, learned, steps, batch, learning_rate)
        table[name] = {**_errors(network, unseen), "seconds": time.monotonic() - start}
        print(name, {key: round(value, 3) for key, value in table[name].items()})
    write_json(Path(out), {"machine": machine(), "steps": steps, "batch": batch, "pairs": pairs, "table": table})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(run)
