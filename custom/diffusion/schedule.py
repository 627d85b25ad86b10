"""The sampling schedule as data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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


def listed_timesteps(timesteps: Sequence[int] | int, num_train_timesteps: int = 1000) -> list[int]:
    """Descending times of the network calls; after the last one the sample is clean.

    Args:
        timesteps: strictly descending times in [0, num_train_timesteps), or a number of evenly spaced steps.
        num_train_timesteps: length of the training schedule.

    Raises:
        ValueError: when the times do not descend strictly or leave the schedule.
    """
    if isinstance(timesteps, int):
        return spaced_timesteps(timesteps, num_train_timesteps)
    times = [int(t) for t in timesteps]
    if not times or times[0] >= num_train_timesteps or times[-1] < 0:
        raise ValueError(f"timesteps: must be a non-empty list within [0, {num_train_timesteps}), got {times}")
    if any(later >= earlier for earlier, later in zip(times, times[1:], strict=False)):
        raise ValueError(f"timesteps: must descend strictly, from noise to image, got {times}")
    return times
