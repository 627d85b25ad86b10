"""What does one evaluation and one training step cost, against MONAI's own conditional U-Nets? 64^3 voxels, one sample.

    python benchmarks/cost.py

FLOPs and training memory are exact counts over the operations and the saved tensors of one call; seconds are
measured, the networks taking turns. All share channels, residual blocks and norm groups; none has attention but in the
middle block. Training is a squared error, its backward pass and an AdamW step in float32.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import fire
import torch
from common import RESULTS, machine
from custom.diffusion.context import Context
from custom.diffusion.network import Condition, StructDiffUNet
from custom.runs.files import write_json
from custom.volumes.haar import haar_pack, haar_unpack
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

logger = logging.getLogger(__name__)

OURS, CACHED, BASELINE = "ours, full call", "ours, cached step", "concatenated mask"
MEAN = "ours, mean alone"
NUM_LABELS = 11
CHANNELS = (32, 64, 96)
TARGETS = {  # how much cheaper than the baseline, of what is called once a step of sampling or training
    "flops": (CACHED, 6.5),
    "forward_s": (CACHED, 6.0),
    "train_step_s": (OURS, 5.0),
    "training_mib": (OURS, 3.0),
}


class Rival(NamedTuple):
    """A network and what it is called with.

    Attributes:
        network: what is trained.
        inputs: edge length in voxels -> keyword arguments of `call`.
        call: (network, **inputs) -> (1, 1, H, W, D), the velocity, or of MEAN the mean.
    """

    network: torch.nn.Module
    inputs: Callable[[int], dict[str, Any]]
    call: Callable[..., torch.Tensor]


class ControlledUNet(torch.nn.Module):
    """MONAI's ControlNet and the U-Net it steers, both trained; the mask is embedded at full resolution."""

    def __init__(self, common: dict[str, Any]) -> None:
        super().__init__()
        self.unet = DiffusionModelUNet(in_channels=1, out_channels=1, **common)
        self.control = ControlNet(
            in_channels=1,
            conditioning_embedding_in_channels=NUM_LABELS,
            conditioning_embedding_num_channels=(16,),
            **common,
        )

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity of x (B, 1, H, W, D) for a one-hot mask (B, labels, H, W, D)."""
        down, middle = self.control(x, timesteps, controlnet_cond=mask)
        return self.unet(x, timesteps, down_block_additional_residuals=down, mid_block_additional_residual=middle)


def _noisy(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(1, 1, size, size, size), "timesteps": torch.tensor([500])}


def _with_mask(size: int) -> dict[str, torch.Tensor]:
    return {**_noisy(size), "mask": torch.rand(1, NUM_LABELS, size, size, size)}


def _with_context(size: int) -> dict[str, torch.Tensor]:
    shape = (1, 1, size, size, size)
    images = {name: torch.randn(shape) for name in Context._fields}
    labels = {name: torch.randint(0, NUM_LABELS, shape).float() for name in ("target_label", "template_label")}
    return {**_noisy(size), "context": Context(**(images | labels)).stacked()}


def _only_context(size: int) -> dict[str, torch.Tensor]:
    return {"context": _with_context(size)["context"]}


def _with_condition(network: StructDiffUNet) -> Callable[[int], dict[str, Any]]:
    def inputs(size: int) -> dict[str, Any]:
        with torch.no_grad():
            return {**_noisy(size), "condition": network.encode(_with_context(size)["context"])}

    return inputs


def rivals(amp: bool = False) -> dict[str, Rival]:
    """All networks of the table, freshly initialised, by their name in it."""
    ours = StructDiffUNet(num_labels=NUM_LABELS, channels=CHANNELS, num_res_blocks=1, norm_num_groups=8, amp=amp)
    common: dict[str, Any] = {
        "spatial_dims": 3,
        "channels": CHANNELS,
        "num_res_blocks": 1,
        "attention_levels": (False,) * len(CHANNELS),
        "norm_num_groups": 8,
    }
    concatenated = DiffusionModelUNet(in_channels=1 + NUM_LABELS, out_channels=1, **common)
    spade = SPADEDiffusionModelUNet(in_channels=1, out_channels=1, label_nc=NUM_LABELS, **common)

    def call_cached(
        net: StructDiffUNet, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        return haar_unpack(net.flow(haar_pack(x), timesteps, condition.features))

    def call_concatenated(
        net: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return net(torch.cat([x, mask], 1), timesteps)

    def call_spade(net: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return net(x, timesteps, seg=mask)

    return {
        OURS: Rival(ours, _with_context, lambda net, **inputs: net(**inputs)),
        CACHED: Rival(ours, _with_condition(ours), call_cached),
        MEAN: Rival(ours, _only_context, lambda net, context: haar_unpack(net.encode(context).mean)),
        BASELINE: Rival(concatenated, _with_mask, call_concatenated),
        "SPADE": Rival(spade, _with_mask, call_spade),
        "ControlNet": Rival(ControlledUNet(common), _with_mask, lambda net, **inputs: net(**inputs)),
    }


def count_flops(rival: Rival, size: int) -> int:
    """FLOPs of one forward call, two for each multiply-add of convolutions and matrix products."""
    inputs = rival.inputs(size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rival.call(rival.network, **inputs)
    return counter.get_total_flops()


def count_training_bytes(rival: Rival, size: int) -> int:
    """Bytes held when the backward pass begins: distinct saved tensors, parameters and their gradients.

    Left out are optimiser states, the same multiple of the parameters for all, and the work areas of convolutions.
    """
    own = {t.untyped_storage().data_ptr() for t in (*rival.network.parameters(), *rival.network.buffers())}
    kept: dict[int, int] = {}
    alive = []  # a freed storage could lend its address to the next

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(storage)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = rival.inputs(size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = rival.call(rival.network, **inputs)
        F.mse_loss(velocity, torch.zeros_like(velocity))
    return sum(kept.values()) + 2 * sum(p.numel() * p.element_size() for p in rival.network.parameters())


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _forward(rival: Rival, size: int, *, bf16: bool) -> Callable[[], Any]:
    inputs = rival.inputs(size)
    if bf16:
        # 5 axes only: timesteps have one, and a condition is a tuple of its own making.
        last = {
            k: v.to(memory_format=torch.channels_last_3d) if getattr(v, "ndim", 0) == 5 else v
            for k, v in inputs.items()
        }
        rival.network.to(memory_format=torch.channels_last_3d)
        inputs = last

    def run() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return rival.call(rival.network, **inputs)

    return run


def _train_step(rival: Rival, size: int) -> Callable[[], Any]:
    inputs, optimizer = rival.inputs(size), torch.optim.AdamW(rival.network.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        velocity = rival.call(rival.network, **inputs)
        F.mse_loss(velocity, torch.zeros_like(velocity)).backward()
        optimizer.step()

    return run


def measure_seconds(size: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repeat, {column: {name: [...]}}; all networks have their turn in each, after one to warm up."""
    single, half = rivals(), rivals(amp=True)
    runs = {
        "forward_s": {name: _forward(rival, size, bf16=False) for name, rival in single.items()},
        "forward_bf16_s": {name: _forward(rival, size, bf16=True) for name, rival in half.items()},
        "train_step_s": {name: _train_step(rival, size) for name, rival in single.items() if name != CACHED},
    }
    seconds: dict[str, dict[str, list[float]]] = {column: {name: [] for name in row} for column, row in runs.items()}
    for repeat in range(repeats + 1):
        for column, row in runs.items():
            for name, run in row.items():
                elapsed = _seconds(run)
                logger.info("repeat %d, %s, %s: %.2f s", repeat, column, name, elapsed)
                if repeat:
                    seconds[column][name].append(elapsed)
    return seconds


def _ratios(row: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    return {column: baseline[column] / value for column, value in row.items() if column in baseline}


def main(size: int = 64, repeats: int = 5, timed: bool = True) -> None:
    """Count and time all networks; print the table and, when timed, write benchmarks/results/cost.json.

    Args:
        size: edge of the volume in voxels.
        repeats: timed calls of each network, after one to warm up.
        timed: False counts only.
    """
    networks = rivals()
    table: dict[str, dict[str, float]] = {}
    for name, rival in networks.items():
        table[name] = {"flops": float(count_flops(rival, size))}
        if name != CACHED:
            table[name]["training_mib"] = count_training_bytes(rival, size) / 2**20
            table[name]["parameters"] = float(sum(p.numel() for p in rival.network.parameters()))
    seconds = measure_seconds(size, repeats) if timed else {}
    for column, row in seconds.items():
        for name, values in row.items():
            table[name][column] = statistics.median(values)
    ratios = {name: _ratios(row, table[BASELINE]) for name, row in table.items()}
    if timed:
        content = {"machine": machine(), "size": size, "repeats": repeats, "table": table, "seconds": seconds}
        write_json(RESULTS / "cost.json", {**content, "ratios": ratios, "targets": TARGETS})
    _print_table(table, ratios, seconds)


def _print_table(
    table: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]], seconds: dict[str, dict[str, list[float]]]
) -> None:
    units = {"flops": ("GFLOPs", 1e9), "training_mib": ("training MiB", 1.0), "parameters": ("M parameters", 1e6)}
    units |= {
        "forward_s": ("forward s", 1.0),
        "forward_bf16_s": ("forward bf16 s", 1.0),
        "train_step_s": ("train step s", 1.0),
    }
    columns = [column for column in units if column in table[BASELINE]]
    print("| network | " + " | ".join(units[c][0] for c in columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        cells = []
        for column in columns:
            if column not in row:
                cells.append("")
                continue
            cell = f"{row[column] / units[column][1]:.3g}"
            if column in seconds:
                cell += f" ({min(seconds[column][name]):.3g}-{max(seconds[column][name]):.3g})"
            cells.append(f"{cell}, {ratios[name][column]:.3g}x")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nRatios: concatenated mask over this network, above 1 is cheaper. Seconds: median (fastest-slowest).")
    missed = [c for c, (name, target) in TARGETS.items() if c in ratios[name] and ratios[name][c] < target]
    native = "native" if machine()["native_bf16"] else "emulated, so slower than float32"
    print(f"Targets missed: {missed or 'none'}. bf16 (autocast, channels last) is {native} on this processor.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fire.Fire(main)
