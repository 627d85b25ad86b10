"""MONAI's ways to condition a diffusion of the image on masks and a template, of about one training cost.

The nets of `benchmarks/rivals.py`. Each diffuses the image itself at full resolution, as its users would, and is told
the same: target mask, template image and template mask. The widths make a training step cost what one of ours costs
(`tests/benchmarks/test_rivals.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import ANATOMY
from custom.diffusion.sampler import blended, windows_of
from custom.volumes.grids import crop, crop_to, pad_to_multiple
from ddim import ListedDDIMScheduler
from monai.networks.nets import ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

IMAGE_MEAN_HU, IMAGE_SD_HU = 0.0, 450.0
"""Of the voxels of training crops, so that what is diffused has about unit variance."""
_LABELS = ANATOMY.num_labels
_CONDITION = 2 * _LABELS + 1
_MULTIPLE, _OVERLAP = 8, 0.4  # voxels of four levels; of windows, as our sampler has it
_WIDTHS = (8, 16, 32, 64)
_SPADE_WIDTHS, _SPADE_HIDDEN = (8, 8, 16, 32), 6  # its default of 128 would cost some 15 times as much


def scaled(image_hu: torch.Tensor) -> torch.Tensor:
    """HU in units of what is diffused."""
    return (image_hu - IMAGE_MEAN_HU) / IMAGE_SD_HU


def condition_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the nets are told, (B, 23, H, W, D): target mask, template mask, both one-hot, and the template image.

    Args:
        batch: `label`, `template_label` and `template_image`, each (B, 1, H, W, D).
    """
    masks = [F.one_hot(batch[k][:, 0].long(), _LABELS).movedim(-1, 1) for k in ("label", "template_label")]
    return torch.cat([*(mask.float() for mask in masks), scaled(batch["template_image"].float())], 1)


def _options(widths: Sequence[int]) -> dict[str, Any]:
    return {
        "spatial_dims": 3,
        "channels": tuple(widths),
        "num_res_blocks": 1,
        "attention_levels": (False,) * len(widths),
        "norm_num_groups": 8,
    }


class Concatenated(nn.Module):
    """`DiffusionModelUNet` that reads the condition beside the noisy image."""

    stages = 1

    def __init__(self) -> None:
        super().__init__()
        self.unet = DiffusionModelUNet(in_channels=1 + _CONDITION, out_channels=1, **_options(_WIDTHS))

    def begin(self, stage: int) -> list[nn.Parameter]:
        """Weights that a stage of the training changes."""
        return list(self.parameters())

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Velocity of x (B, 1, H, W, D), sizes a multiple of 8."""
        return self.unet(torch.cat([x, condition], 1), timesteps)


class Controlled(nn.Module):
    """Unconditional `DiffusionModelUNet`, then a `ControlNet` on it while it is frozen.

    The condition has the size of the image, so that its embedding does not reduce it.
    """

    stages = 2

    def __init__(self) -> None:
        super().__init__()
        self.unet = DiffusionModelUNet(in_channels=1, out_channels=1, **_options(_WIDTHS))
        self.control = ControlNet(
            in_channels=1,
            conditioning_embedding_in_channels=_CONDITION,
            conditioning_embedding_num_channels=(16,),
            **_options(_WIDTHS),
        )
        self.controlled = True

    def begin(self, stage: int) -> list[nn.Parameter]:
        """Weights that a stage changes: those of the U-Net, then those of the ControlNet, which starts as its copy."""
        self.controlled = stage > 0
        if self.controlled:
            self.control.load_state_dict(self.unet.state_dict(), strict=False)
        self.unet.requires_grad_(not self.controlled)
        self.control.requires_grad_(self.controlled)
        return [weight for weight in self.parameters() if weight.requires_grad]

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Velocity of x (B, 1, H, W, D), sizes a multiple of 8; without the condition in the first stage."""
        if not self.controlled:
            return self.unet(x, timesteps)
        down, middle = self.control(x, timesteps, controlnet_cond=condition)
        return self.unet(x, timesteps, down_block_additional_residuals=down, mid_block_additional_residual=middle)


class Normalised(nn.Module):
    """`SPADEDiffusionModelUNet`: the target mask enters by normalisation, the template beside the noisy image."""

    stages = 1

    def __init__(self) -> None:
        super().__init__()
        self.unet = SPADEDiffusionModelUNet(
            in_channels=1 + _CONDITION - _LABELS,
            out_channels=1,
            label_nc=_LABELS,
            spade_intermediate_channels=_SPADE_HIDDEN,
            **_options(_SPADE_WIDTHS),
        )

    def begin(self, stage: int) -> list[nn.Parameter]:
        """Weights that a stage of the training changes."""
        return list(self.parameters())

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Velocity of x (B, 1, H, W, D), sizes a multiple of 8."""
        return self.unet(torch.cat([x, condition[:, _LABELS:]], 1), timesteps, condition[:, :_LABELS])


ARMS: dict[str, type[Concatenated | Controlled | Normalised]] = {
    "concat": Concatenated,
    "controlnet": Controlled,
    "spade": Normalised,
}
SCHEDULE = DDPMScheduler(1000, schedule="cosine", prediction_type="v_prediction", clip_sample=False)


def velocity_loss(network: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the velocity at random times, for a batch with `image` (B, 1, H, W, D) in HU."""
    x0 = scaled(batch["image"].float())
    timesteps = torch.randint(0, SCHEDULE.num_train_timesteps, (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    predicted = network(SCHEDULE.add_noise(x0, noise, timesteps), timesteps, condition_of(batch))
    return F.mse_loss(predicted, SCHEDULE.get_velocity(x0, noise, timesteps))


def step_flops(network: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """FLOPs of the forward pass, and of a training step (with the backward pass), on a batch."""
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        velocity_loss(network, batch)
    with FlopCounterMode(display=False) as step:
        velocity_loss(network, batch).backward()
    network.zero_grad(set_to_none=True)
    return {"forward": forward.get_total_flops(), "step": step.get_total_flops()}


@torch.no_grad()
def draw(
    network: nn.Module, condition: torch.Tensor, noise: torch.Tensor, steps: int, window: int | None = None
) -> torch.Tensor:
    """Images (B, 1, H, W, D) in HU by DDIM from noise.

    MONAI's own `DDIMScheduler` visits other times than it steps by (`benchmarks/ddim.py`), which would leave noise
    behind: the rivals are given the scheduler that does not.

    Args:
        network: in evaluation mode.
        condition: (B, 23, H, W, D) of :func:`condition_of`.
        noise: (B, 1, H, W, D).
        steps: times at which the network is called.
        window: voxels a side of windows, a multiple of 8, that are blended at every step; None takes whole volumes.
    """
    scheduler, size = ListedDDIMScheduler(steps), noise.shape[2:]
    x, padded = pad_to_multiple(noise, _MULTIPLE), pad_to_multiple(condition, _MULTIPLE)
    grid = list(x.shape[2:])
    windows = windows_of(grid, [window] * 3 if window else grid, _OVERLAP)

    def velocity(x: torch.Tensor, timesteps: torch.Tensor, index: int) -> torch.Tensor:
        return network(crop(x, windows[index]), timesteps, crop(padded, windows[index]))

    for t in scheduler.timesteps.tolist():
        timesteps = torch.full((len(x),), t, dtype=torch.long, device=x.device)
        x, _ = scheduler.step(blended(partial(velocity, x, timesteps), windows, grid), t, x)
    return crop_to(x, size) * IMAGE_SD_HU + IMAGE_MEAN_HU
