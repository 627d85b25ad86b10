"""Skip-sampling variance: how far samples of one noise differ between schedules, and what that says (torch).

The idea, that skipping steps differently uncovers where a sample is not to be trusted, is StructDiff's (arXiv
2503.09560, abstract); the formulas are ours. Variances are in HU^2, of structure: rendered images have no grain yet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def predicted_variance(sigma: Tensor) -> Tensor:
    """Variance of voxels of a packed residual of independent Haar bands, exactly: the mean of their variances.

    Args:
        sigma: (B, 8, h, w, d) deviations of the bands.

    Returns:
        (B, 1, 2h, 2w, 2d), in squared units of sigma.
    """
    return F.interpolate(sigma.float().square().mean(1, keepdim=True), scale_factor=2)


class RunningVariance:
    """Unbiased variance over samples that come one at a time (Welford 1962).

    Two volumes are held, however many samples come. One sample has no variance: `value` refuses it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, sample: Tensor) -> None:
        """Take one sample (B, 1, H, W, D) in HU; all must have one shape."""
        value = sample.float()
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = value, torch.zeros_like(value)
            return
        difference = value - self._mean
        self._mean = self._mean + difference / self.count
        self._squares = self._squares + difference * (value - self._mean)

    def value(self) -> Tensor:
        """Variance (B, 1, H, W, D) in HU^2.

        Raises:
            ValueError: with fewer than two samples.
        """
        if self._squares is None or self.count < 2:
            raise ValueError(f"a variance needs two samples or more, got {self.count}; use two schedules or more.")
        return self._squares / (self.count - 1)


def confidence(variance: Tensor, label: Tensor, tau: Tensor, *, c_min: float = 0.05) -> Tensor:
    """Confidence max(c_min, exp(-u / tau)) with tau of the label of each voxel.

    Args:
        variance: u, (H, W, D) in HU^2.
        label: (H, W, D) whole numbers.
        tau: (num_labels,) in HU^2.
        c_min: smallest confidence, in [0, 1): no voxel is thrown away.

    Returns:
        (H, W, D) in [c_min, 1]; 1 where the variance is 0.

    Raises:
        ValueError: if a label is outside the table, or `c_min` out of range.
    """
    ids = label.round().long()
    if int(ids.max()) >= len(tau) or int(ids.min()) < 0:
        raise ValueError(
            f"tau: the table is for labels 0 to {len(tau) - 1}, got labels {int(ids.min())} to {int(ids.max())}; "
            "calibrate with this label map."
        )
    if not 0 <= c_min < 1:
        raise ValueError(f"c_min must be in [0, 1), got {c_min}.")
    return (-variance / tau.to(variance)[ids]).exp().clamp(min=c_min)


def sample_score(variance: Tensor, label: Tensor) -> float:
    """Mean over the present labels, background left out, of the mean sqrt(variance) in the label, in HU; NaN without.

    Every label weighs the same: most voxels are background, few are coronary.
    """
    ids = label.round().long()
    means = [float(variance[ids == value].sqrt().mean()) for value in ids.unique().tolist() if value != 0]
    return sum(means) / len(means) if means else float("nan")
