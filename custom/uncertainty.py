"""Skip-sampling variance: how far samples of one noise differ between schedules, and what that says (layer 0, torch).

The idea, that skipping steps differently uncovers where a sample is not to be trusted, is StructDiff's (arXiv
2503.09560, abstract); the formulas are ours. Variances are in HU^2, of images averaged over 3^3 voxels first, so that
they tell structure and not grain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from custom.diffusion import depth_to_space, haar_unpack

__all__ = [
    "RunningVariance",
    "confidence",
    "local_mean",
    "local_mean_variance",
    "sample_score",
    "sample_weights",
    "tau_table",
]

_MIN_VOXELS = 20
_MIN_TAU_HU2 = 1.0


def local_mean(volume: Tensor, size: int = 3) -> Tensor:
    """Mean over size^3 voxels, borders repeated; (B, C, H, W, D) of any size, also one voxel."""
    reach = size // 2
    return F.avg_pool3d(F.pad(volume, (reach,) * 6, mode="replicate"), size, stride=1)


def _spread_kernels(to_voxels: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared 3^3 averages (8, 1, 4, 4, 4) of the 8 basis functions of a block of 2^3 voxels, one voxel around it."""
    functions = to_voxels(torch.eye(8).view(8, 8, 1, 1, 1))
    return F.avg_pool3d(F.pad(functions, (2,) * 6), 3, stride=1).square()


def local_mean_variance(sigma: Tensor, edge: Tensor) -> Tensor:
    """Variance of 3^3 averages of a packed residual of independent components, exactly; no sampling. Ours.

    An average is linear in the components, so its variance is the sum of their variances times the squared averages of
    their basis functions: a transposed convolution.

    Args:
        sigma: (B, 8, h, w, d) deviations in the local basis: Haar bands, single voxels where `edge` holds.
        edge: (B, 1, h, w, d) bool.

    Returns:
        (B, 1, 2h, 2w, 2d), in squared units of sigma. At the border, averages reach over zeros.
    """
    variance = sigma.float().square()
    spread = [
        F.conv_transpose3d(torch.where(where, variance, 0.0), kernels.to(variance), stride=2, padding=1)
        for where, kernels in ((edge, _spread_kernels(depth_to_space)), (~edge, _spread_kernels(haar_unpack)))
    ]
    return spread[0] + spread[1]


class RunningVariance:
    """Unbiased variance over samples that come one at a time (Welford 1962), each averaged over 3^3 voxels.

    Two volumes are held, however many samples come. One sample has no variance: `value` refuses it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, sample: Tensor) -> None:
        """Take one sample (B, 1, H, W, D) in HU; all must have one shape."""
        smooth = local_mean(sample.float())
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = smooth, torch.zeros_like(smooth)
            return
        difference = smooth - self._mean
        self._mean = self._mean + difference / self.count
        self._squares = self._squares + difference * (smooth - self._mean)

    def value(self) -> Tensor:
        """Variance (B, 1, H, W, D) in HU^2.

        Raises:
            ValueError: with fewer than two samples.
        """
        if self._squares is None or self.count < 2:
            raise ValueError(f"a variance needs two samples or more, got {self.count}; use two schedules or more.")
        return self._squares / (self.count - 1)


def tau_table(
    cases: Iterable[tuple[Tensor, Tensor]], *, num_labels: int, quantile: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Scale of the variance for each label, such that confidence is one half at a quantile.

    Not for each distance to an edge as well: errors and variances both grow towards edges, and a scale that follows
    them takes away what orders the errors inside a label (`docs/FINDINGS.md`).

    Args:
        cases: (variance, label) of each case, of one shape.
        num_labels: label ids 0 to num_labels - 1.
        quantile: in (0, 1), of the variances of a label over all cases.

    Returns:
        tau (num_labels,) in HU^2, u_q / ln 2, at least 1 HU^2, and the voxels (num_labels,) that it is from. Labels of
        fewer than 20 voxels take tau of everything.

    Raises:
        ValueError: if the quantile is out of range or there is no case.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}.")
    parts: dict[int, list[Tensor]] = {}
    for variance, label in cases:
        ids = label.round().long()
        for index in ids.unique().tolist():
            parts.setdefault(index, []).append(variance[ids == index].double())
    if not parts:
        raise ValueError("cases must hold at least one image to calibrate with, got none.")
    merged = {index: torch.cat(values) for index, values in parts.items()}

    def scale(values: Tensor) -> float:
        rank = min(int(quantile * len(values)), len(values) - 1)  # torch.quantile is limited to 2^24 values
        return max(float(values.kthvalue(rank + 1).values) / log(2), _MIN_TAU_HU2)

    tau = torch.full((num_labels,), scale(torch.cat(list(merged.values()))))
    count = torch.zeros(num_labels, dtype=torch.long)
    for index, values in merged.items():
        count[index] = len(values)
        if len(values) >= _MIN_VOXELS:
            tau[index] = scale(values)
    return tau, count


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


def sample_weights(scores: Sequence[float]) -> list[float]:
    """Weights of mean 1 from scores in HU, less for the higher: r proportional to 1 / (1 + score / median). Ours.

    The worst sample of a set keeps a share: half of what a perfect one gets at the median score, a fifth at four times
    the median.

    Args:
        scores: at least 0; NaN (no score) weighs 1.

    Returns:
        one weight each; all 1 when the scores are alike, all are 0 or none is known.

    Raises:
        ValueError: for a negative score.
    """
    known = torch.tensor([s for s in scores if s == s], dtype=torch.float64)
    if bool((known < 0).any()):
        raise ValueError(f"scores: must not be negative, got {float(known.min())}")
    median = float(known.median()) if len(known) else 0.0
    if median == 0:
        return [1.0] * len(scores)
    weights = 1 / (1 + known / median)
    rest = iter((weights / weights.mean()).tolist())
    return [next(rest) if s == s else 1.0 for s in scores]
