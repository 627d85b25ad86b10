"""The table that turns variances into confidence, by label. Ours."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from math import log
from pathlib import Path
from typing import Any

import torch
from custom.runs.files import content_hash, plain_values, write_json
from custom.volumes.grids import as_batch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import Tensor

logger = logging.getLogger(__name__)
_VOXELS_OF_A_LABEL = 50_000  # of a case, ours: the rank of a 0.9 quantile is then known to 0.13 %


class CalibrateConfidence:
    """Collect variances of rendered held-out masks and write the confidence table.

    At most 50,000 voxels of each label are kept of a case, drawn by the name of its mask, `mask_name` of the batch.

    Args:
        path: JSON file to write.
        made_with: what the variance depends on: weights, spacing and so on; goes into the table.
        num_labels: label ids 0 to num_labels - 1.
        quantile: variance at which confidence is one half.

    Raises:
        ValueError: when no weights made the variances.
    """

    def __init__(self, path: str, *, made_with: Mapping[str, Any], num_labels: int, quantile: float = 0.9) -> None:
        if made_with.get("weights") is None:
            raise ValueError(
                "mode: confidence is calibrated for a network, got a mode without one, whose confidence is 1 "
                "everywhere; leave `calibrating` out, `synthesizing` needs no table then"
            )
        self.path, self.made_with = Path(path), plain_values(made_with)
        self.num_labels, self.quantile = num_labels, quantile
        self._cases: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._names: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose predictions are (B, 2, H, W, D)."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep variance and label of some voxels of each case."""
        variances = engine.state.output[Keys.PRED][:, 1].cpu()  # type: ignore[index]
        labels, names = (engine.state.batch[key] for key in ("label", "mask_name"))  # type: ignore[index]
        for variance, volume, name in zip(variances, labels, names, strict=True):
            label = as_batch(volume)[0, 0].cpu().round().long()
            file = f"{name}.nii.gz"  # drawn by file names, the shipped table has its scales
            generator = torch.Generator().manual_seed(int(content_hash(file.encode())[:8], 16))
            ids, kept = label.flatten(), []
            for index in ids.unique().tolist():
                voxels = (ids == index).nonzero()[:, 0]
                kept.append(voxels[torch.randperm(len(voxels), generator=generator)[:_VOXELS_OF_A_LABEL]])
            chosen = torch.cat(kept)
            self._cases.append((variance.flatten()[chosen], ids[chosen]))
            self._names.append(name)

    def write(self, engine: Engine) -> None:
        """Write the table."""
        tau, count = tau_table(self._cases, num_labels=self.num_labels, quantile=self.quantile)
        content = {"tau_hu2": tau.tolist(), "voxels": count.tolist(), "quantile": self.quantile, "masks": self._names}
        write_json(self.path, {**content, **self.made_with}, option="confidence_table")
        logger.info("confidence table of %d cases: %s", len(self._cases), self.path)


_FEWEST_VOXELS = 20  # ours: below, a 0.9 quantile has fewer than two voxels above it
_MIN_TAU_HU2 = 1.0  # the step of 1 HU in which images are written


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
        if len(values) >= _FEWEST_VOXELS:
            tau[index] = scale(values)
    return tau, count
