"""Confidence of rendered voxels, as dictionary transforms."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from custom.confidence.variance import confidence, sample_score
from custom.runs.files import plain_values, read_json
from custom.volumes.grids import as_batch
from monai.data import MetaTensor
from monai.transforms import Transform

logger = logging.getLogger(__name__)


class SplitVarianced(Transform):
    """Split `pred` (2, H, W, D) into `pred`, the image, and `variance`, both (1, H, W, D)."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split one item."""
        return {**data, "pred": data["pred"][:1], "variance": data["pred"][1:]}


class TrustPaintedd(Transform):
    """Add `confidence` 1 and `score` 0 to a painted `pred` (1, H, W, D): it shows its mask by construction."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Trust one item."""
        kept = MetaTensor(torch.ones_like(torch.as_tensor(data["pred"])), meta=data["pred"].meta)
        return {**data, "confidence": kept, "score": 0.0}


_REMEDY = "calibrate anew (calibrate.json), or point `confidence_table` to another"


def scales_of(values: Any, table: str) -> torch.Tensor:
    """tau (num_labels,) in HU^2 of a table.

    Raises:
        ValueError: naming the table, when it has none, or such that are not numbers above 0.
    """
    if isinstance(values, list) and any(isinstance(value, list) for value in values):
        raise ValueError(f"{table}: was made by an older version, by label and edge distance; calibrate anew")
    numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(
            f"{table}: is damaged (tau_hu2 must hold a number above 0 for each label, got {values}); {_REMEDY}"
        )
    return torch.tensor(values, dtype=torch.float32)


class EstimateConfidenced(Transform):
    """Add `confidence` (1, H, W, D) and `score` (HU) from `variance` and `label`.

    Args:
        table: JSON file of :class:`CalibrateConfidence`.
        made_with: what the variance depends on: weights, spacing and so on; the table must agree with all of it.
        c_min: smallest confidence.

    Raises:
        FileNotFoundError: when there is no table.
        ValueError: when it was made with something else, or is damaged.
    """

    def __init__(self, table: str, *, made_with: Mapping[str, Any], c_min: float = 0.05) -> None:
        path = Path(table)
        if not path.is_file():
            raise FileNotFoundError(f"{table}: no confidence table; run calibrate.json with these weights first")
        content = read_json(path, _REMEDY)
        for key, value in plain_values(made_with).items():
            if content.get(key) != value:
                before = "the model.pt of `ckpt_dir`" if key == "weights" else "the options that it was made with"
                raise ValueError(
                    f"{table}: was made with {key} {content.get(key)}, not {value}; calibrate anew, or bring back "
                    f"{before}"
                )
        self.tau, self.c_min = scales_of(content.get("tau_hu2"), table), c_min

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Judge one item."""
        label, variance = as_batch(data["label"])[0, 0].cpu(), as_batch(data["variance"])[0, 0].cpu()
        values = confidence(variance, label, self.tau, c_min=self.c_min)
        kept = MetaTensor(values[None], meta=data["pred"].meta)
        return {**data, "confidence": kept, "score": sample_score(variance, label)}
