"""Handlers that leave pictures and tables of an evaluation."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.transforms import Orientation
from monai.utils import CommonKeys as Keys

from custom.runs.files import replace_file
from custom.volumes.pictures import save_mask_sheet, save_sheet


class Previews:
    """Write a PNG of the first cases of an evaluation: truth, where there is one, and rendering.

    Args:
        directory: of the pictures.
        vessel_labels: ids of the vessel projection.
        cases: at most so many batches are drawn.
        by_case: one picture `<case>.png` for each case instead of one `epoch_<n>.png` for all.
    """

    def __init__(self, directory: str, *, vessel_labels: Sequence[int], cases: int = 1, by_case: bool = False) -> None:
        self.directory, self.vessel_labels = Path(directory), vessel_labels
        self.cases, self.by_case = cases, by_case
        self._rows: list[tuple[str, np.ndarray, np.ndarray]] = []
        self._drawn = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep the first cases."""
        if self._drawn >= self.cases or idist.get_rank() != 0:
            return
        self._drawn += 1
        truth = engine.state.output[Keys.LABEL][0].cpu().numpy()  # type: ignore[index]
        rendered = engine.state.output[Keys.PRED][0, 0].cpu().numpy()  # type: ignore[index]
        case = engine.state.batch["case"][0]  # type: ignore[index]
        if len(truth) == 2:
            self._rows.append((f"{case}: true", truth[0], truth[1]))
        self._rows.append((f"{case}: rendered", rendered, truth[-1]))
        if self.by_case:
            save_sheet(self.directory / f"{case}.png", self._rows, vessel_labels=self.vessel_labels)
            self._rows = []

    def write(self, engine: Engine) -> None:
        """Write the picture."""
        if self._rows:
            save_sheet(
                self.directory / f"epoch_{engine.state.epoch:04d}.png", self._rows, vessel_labels=self.vessel_labels
            )
        self._rows, self._drawn = [], 0


class MetricsTable:
    """Append the metrics to a CSV after each evaluation; rows of epochs that a resumed run repeats are replaced.

    Args:
        path: of the CSV.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write one row."""
        if idist.get_rank() != 0:
            return
        row: dict[str, Any] = {"epoch": engine.state.epoch, **engine.state.metrics}
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["epoch"]) < row["epoch"]]

        def write(part: Path) -> None:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(row), extrasaction="ignore")
                writer.writeheader()
                writer.writerows([*rows, row])

        replace_file(self.path, write)


class LabelTable:
    """Write `<path>` with a row for every case and label, and add the mean of every label to the engine's metrics.

    Attach before handlers that log metrics. A metric joins through `save_details` of its handler.

    Args:
        path: of the CSV; columns `case`, `label` and the metrics; empty where a metric is not defined.
        label_names: one for each id, background first.
        columns: metric -> ids of its columns.
    """

    def __init__(self, path: str, *, label_names: Sequence[str], columns: Mapping[str, Sequence[int]]) -> None:
        self.path, self.label_names = Path(path), list(label_names)
        self.columns = {name: list(ids) for name, ids in columns.items()}
        self._cases: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator of decollated batches."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep the order of the cases."""
        self._cases += [item["case"] for item in engine.state.batch]  # type: ignore[union-attr]

    def write(self, engine: Engine) -> None:
        """Write the table."""
        details: Mapping[str, Any] = engine.state.metric_details  # type: ignore[attr-defined]
        ids = sorted({k for own in self.columns.values() for k in own})
        rows: list[dict[str, Any]] = [{"case": case, "label": self.label_names[k]} for case in self._cases for k in ids]
        for name, own in self.columns.items():
            values = torch.as_tensor(details[name]).cpu().numpy()
            for column, k in enumerate(own):
                for row, value in zip(rows[ids.index(k) :: len(ids)], values[:, column], strict=True):
                    row[name] = "" if np.isnan(value) else f"{value:.4f}"
                known = values[:, column][~np.isnan(values[:, column])]
                if len(known):
                    engine.state.metrics[f"{name} {self.label_names[k]}"] = float(known.mean())
        self._cases = []

        def save(part: Path) -> None:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["case", "label", *self.columns], restval="")
                writer.writeheader()
                writer.writerows(rows)

        replace_file(self.path, save)


class SegmentationPictures:
    """Write `<case>.png` of the first cases: true and predicted labels in three planes, and their vessels.

    Args:
        directory: of the pictures.
        vessel_labels: ids of the vessel view.
        cases: at most so many.
    """

    def __init__(self, directory: str, *, vessel_labels: Sequence[int], cases: int = 4) -> None:
        self.directory, self.vessel_labels, self.cases = Path(directory), vessel_labels, cases
        self.upright = Orientation(axcodes="RAS", labels=None)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator of decollated batches, whose predictions are label maps."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Draw one batch."""
        if engine.state.iteration > self.cases or idist.get_rank() != 0:
            return
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):  # type: ignore[call-overload]
            rows = [
                (f"{item['case']}: {title}", self.upright(output[key])[0].cpu().round().numpy())
                for title, key in (("true", Keys.LABEL), ("predicted", Keys.PRED))
            ]
            save_mask_sheet(self.directory / f"{item['case']}.png", rows, vessel_labels=self.vessel_labels)
