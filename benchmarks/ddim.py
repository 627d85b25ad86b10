"""Plain DDIM, a rival of our sampler: deterministic steps for v-prediction along explicit times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from custom.diffusion.schedule import listed_timesteps
from monai.networks.schedulers import DDIMScheduler


def ddim_step(
    x: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One deterministic DDIM step (Song et al. 2021, eq. 12 with eta = 0) written for v-prediction.

    Symbols as in `custom.diffusion.formulas`.

    Args:
        x, v: current sample and predicted velocity, same shape.
        alpha, alpha_next: cumulative alpha (a^2) at the current and at the next, less noisy, time; 1 means clean.

    Returns:
        the sample at the next time and the predicted clean sample.
    """
    a, s = alpha.sqrt(), (1 - alpha).sqrt()
    x0 = a * x - s * v
    eps = s * x + a * v
    return alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * eps, x0


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
        if num_inference_steps == self.num_train_timesteps:
            # MONAI's constructor asks for the whole training schedule; a sampler needs one call fewer.
            num_inference_steps = self.num_train_timesteps - 1
        times = listed_timesteps(num_inference_steps, self.num_train_timesteps)
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
