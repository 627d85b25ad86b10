"""The sampling schedule as data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler

from custom.diffusion.formulas import ddim_step


def spaced_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Descending times of `num_steps` network calls, evenly spaced from the noisiest time down to, but without, time 0.

    Args:
        num_steps: 1 to `num_train_timesteps` - 1.
        num_train_timesteps: length of the training schedule.

    Raises:
        ValueError: when `num_steps` is out of range.
    """
    if not 1 <= num_steps < num_train_timesteps:
        raise ValueError(f"num_steps: must be 1 to {num_train_timesteps - 1}, got {num_steps}")
    return np.linspace(num_train_timesteps - 1, 0, num_steps + 1).round().astype(int)[:-1].tolist()


class ListedDDIMScheduler(DDIMScheduler):
    """Deterministic v-prediction DDIM whose times are an explicit list; the next time is read from that list.

    MONAI's `DDIMScheduler` visits `linspace(T - 1, 0, n)` but steps by `T // n`, which leaves noise behind unless both
    agree. Here the times may be spaced in any way; after the last one the sample is clean.

    Args:
        timesteps: strictly descending times in [0, num_train_timesteps), or a number of evenly spaced steps.
        num_train_timesteps: length of the training schedule.
        schedule: a schedule of `monai.networks.schedulers.NoiseSchedules`.

    Raises:
        ValueError: when the times do not descend strictly or leave the schedule.
    """

    def __init__(
        self, timesteps: Sequence[int] | int = 10, num_train_timesteps: int = 1000, schedule: str = "cosine"
    ) -> None:
        super().__init__(num_train_timesteps, schedule, clip_sample=False, prediction_type="v_prediction")
        self.set_timesteps(timesteps)

    def set_timesteps(self, num_inference_steps: Sequence[int] | int, device: str | torch.device | None = None) -> None:
        """Set the times of the network calls: a list, or a number of evenly spaced steps."""
        if isinstance(num_inference_steps, int):
            # MONAI's constructor asks for the whole training schedule; a sampler needs one call fewer.
            whole = num_inference_steps == self.num_train_timesteps
            num_inference_steps = spaced_timesteps(num_inference_steps - whole, self.num_train_timesteps)
        times = [int(t) for t in num_inference_steps]
        if not times or times[0] >= self.num_train_timesteps or times[-1] < 0:
            raise ValueError(f"timesteps: must be a non-empty list within [0, {self.num_train_timesteps}), got {times}")
        if any(later >= earlier for earlier, later in zip(times, times[1:], strict=False)):
            raise ValueError(f"timesteps: must descend strictly, from noise to image, got {times}")
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, device=device)
        self._next = dict(zip(times, [*times[1:], None], strict=True))

    def step(  # type: ignore[override]
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step from `timestep` to the next listed time.

        Args:
            model_output: predicted velocity, shape of `sample`.
            timestep: one of the listed times.
            sample: current noisy sample.

        Returns:
            the sample at the next listed time (clean after the last) and the predicted clean sample.

        Raises:
            ValueError: when `timestep` is not in the list.
        """
        if int(timestep) not in self._next:
            raise ValueError(f"timestep: must be one of {list(self._next)}, got {int(timestep)}")
        following = self._next[int(timestep)]
        alphas = self.alphas_cumprod.to(device=sample.device, dtype=torch.float32)
        alpha_next = alphas.new_tensor(1.0) if following is None else alphas[following]
        return ddim_step(sample, model_output, alphas[int(timestep)], alpha_next)
