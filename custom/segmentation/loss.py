"""The loss of confidence-aware adaptive learning (CAL). Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from monai.losses import SoftclDiceLoss
from torch.nn.modules.loss import _WeightedLoss


def class_normalised(values: torch.Tensor, label: torch.Tensor, num_classes: int, largest: float) -> torch.Tensor:
    """Weights of mean 1 in every class of every sample, in proportion to the values, but none far above the rest. Ours.

        w = v / mean(v);  while a w exceeds the limit: v = min(max(w, 0.001), largest)

    Nearly every voxel of a coronary lies at an edge, where confidence is low: normalised over the volume, the weights
    would take loss away from the very class that has too little of it.

    Args:
        values: (B, 1, H, W, D), not negative; their scale does not matter.
        label: (B, 1, H, W, D) ids, 0 to num_classes - 1.
        num_classes: of the label map.
        largest: limit of a voxel in units of its class's mean; kept to 5 %.

    Returns:
        (B, 1, H, W, D) float32. A class of zeros only says nothing about its voxels: they all get 1.
    """
    index = label.long().flatten(1) + num_classes * torch.arange(len(label), device=label.device)[:, None]
    index, weights = index.flatten(), values.float().flatten()
    total = len(label) * num_classes
    count = torch.bincount(index, minlength=total).clamp(min=1)
    while True:
        sums = torch.zeros(total, dtype=torch.float64, device=weights.device)  # float32 loses digits over many voxels
        mean = sums.index_add_(0, index, weights.double()) / count
        scale = torch.where(mean > 0, 1 / mean, 0.0).float()
        weights = torch.where(mean[index] > 0, weights * scale[index], 1.0)
        if not weights.max() > 1.05 * largest:
            return weights.view_as(values)
        weights = weights.clamp(1e-3, largest)  # where nearly all is 0, the little rest must rise for the mean to be 1


def class_weights(values: Sequence[float], num_labels: int, device: torch.device | None = None) -> torch.Tensor:
    """Weights of the classes as `DiceCELoss` and :class:`CALLoss` take them: (num_labels,) float32, above 0.

    Raises:
        ValueError: unless there is one weight for each label, all above 0: a crop that shows no other class than one
            of weight 0 would have a loss of 0 / 0.
    """
    if len(values) != num_labels or not min(values) > 0:
        raise ValueError(
            f"class_weights: need one weight for each of {num_labels} labels, background included, all above 0, got "
            f"{list(values)}"
        )
    return torch.tensor(values, dtype=torch.float32, device=device)


class CALLoss(_WeightedLoss):
    """Dice and cross-entropy weighted by confidence, for confidence-aware adaptive learning (ours).

        L = sum(r w c CE) / sum(c) + mean_bk r_b c_k (1 - (2 sum(w p g) + eps) / (sum(w (p + g)) + eps))
            + l mean_b(r_b clDice_b)

    with w = :func:`class_normalised` confidence^gamma, r_b the weight of a sample, c_k that of a class, p the softmax
    of the logits, g the one-hot label. With the same confidence everywhere and r = 1 it is MONAI's `DiceCELoss`. Not
    its masked losses: they multiply prediction and label by the mask, which squares the weight in the Dice term.

    `gamma` is 0 (all voxels alike) until :class:`custom.segmentation.schedule.ConfidenceSchedule` raises it to 1.

    Args:
        weight: (C,) c as in `DiceCELoss`, whose loss is NaN, too, for volumes of a class of weight 0 alone; None: 1.
        gamma: exponent of the confidence.
        largest_weight: see :func:`class_normalised`.
        cl_dice_weight: l, factor of MONAI's `SoftclDiceLoss` of the thin labels; 0 leaves it out.
        thin_labels: ids of tubular labels.

    Raises:
        ValueError: for a negative exponent or factor, `largest_weight` below 1, or a clDice term without labels.

    References:
        Sudre et al., Generalised Dice overlap, 2017 (Dice as a loss); Shit et al., clDice, CVPR 2021.
    """

    _SMOOTH = 1e-5  # as in DiceCELoss

    def __init__(
        self,
        *,
        weight: torch.Tensor | None = None,
        gamma: float = 1.0,
        largest_weight: float = 5.0,
        cl_dice_weight: float = 0.0,
        thin_labels: Sequence[int] = (),
    ) -> None:
        super().__init__(weight)
        if gamma < 0 or cl_dice_weight < 0:
            raise ValueError(f"gamma, cl_dice_weight: must not be negative, got {gamma} and {cl_dice_weight}")
        if largest_weight < 1:
            raise ValueError(f"largest_weight: must be at least 1, the mean of the weights, got {largest_weight}")
        if cl_dice_weight > 0 and not thin_labels:
            raise ValueError("thin_labels: a clDice term needs the ids of tubular labels")
        self.gamma, self.largest_weight = gamma, largest_weight
        self.cl_dice_weight, self.thin_labels = cl_dice_weight, list(thin_labels)
        self._cl_dice = SoftclDiceLoss(reduction="none")

    def forward(self, input: torch.Tensor, target: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of a batch, in float32.

        Args:
            input: logits (B, C, H, W, D).
            target: label ids (B, 1, H, W, D), or a dictionary of `label` and, where they matter, `confidence`
                (B, 1, H, W, D), at least 0, and `sample_weight` (B,). What is absent counts as 1.

        Returns:
            scalar. A class that a sample lacks counts in its Dice as in `DiceCELoss`: 1 as soon as it is predicted.

        Raises:
            ValueError: when shapes do not fit.
        """
        parts = target if isinstance(target, Mapping) else {"label": target}
        logits, label = input.float(), parts["label"]
        confidence = parts.get("confidence", torch.ones_like(label))
        sample = parts.get("sample_weight", logits.new_ones(len(logits))).to(logits)
        if label.shape != (len(logits), 1, *logits.shape[2:]) or confidence.shape != label.shape:
            raise ValueError(
                f"target: label and confidence must be (B, 1, H, W, D) beside logits {tuple(logits.shape)}, got "
                f"{tuple(label.shape)} and {tuple(confidence.shape)}"
            )
        c = logits.new_ones(logits.shape[1]) if self.weight is None else self.weight.to(logits)
        if len(c) != logits.shape[1]:
            raise ValueError(f"weight: needs one value for each of {logits.shape[1]} classes, got {len(c)}")
        w = class_normalised(confidence.float() ** self.gamma, label, logits.shape[1], self.largest_weight)
        log_p, ids = logits.log_softmax(1), label.long()
        p, r, share = log_p.exp(), sample.view(-1, 1, 1, 1, 1), c[ids]
        cross_entropy = -(r * w * share * log_p.gather(1, ids)).sum() / share.sum()
        g = torch.zeros_like(p).scatter_(1, ids, 1.0)
        wp, space = w * p, (2, 3, 4)
        overlap, both = (wp * g).sum(space), (wp + w * g).sum(space)
        dice = (r[..., 0, 0, 0] * c * (1 - (2 * overlap + self._SMOOTH) / (both + self._SMOOTH))).mean()
        loss = cross_entropy + dice
        if self.cl_dice_weight > 0:
            thin = self._cl_dice(p[:, self.thin_labels], g[:, self.thin_labels])
            loss = loss + self.cl_dice_weight * (sample * thin).mean()
        return loss
