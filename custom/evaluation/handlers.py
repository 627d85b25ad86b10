"""Handlers that leave pictures and tables of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from custom.evaluation.labels import ColumnMetric
from custom.runs.files import write_json, write_table
from custom.volumes.pictures import save_mask_sheet, save_sheet
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.handlers import IgniteMetricHandler
from monai.transforms import Orientation
from monai.utils import CommonKeys as Keys


class MetricColumns(IgniteMetricHandler):
    """MONAI's handler for a metric of several columns: each joins the engine's metrics and details by its own name.

    The name under which it is attached is not used, so that of a key metric must be the name of a column.

    Args:
        metric_fn: the metric.
        output_transform: from the engine's output to predictions and truth.
        prefix: goes before the names of the columns.
    """

    metric_fn: ColumnMetric

    def __init__(self, metric_fn: ColumnMetric, output_transform: Callable[..., Any], *, prefix: str = "") -> None:
        super().__init__(metric_fn, output_transform=output_transform)
        self.prefix = prefix

    def completed(self, engine: Engine, name: str) -> None:
        """Write mean and details of every column into the engine's state."""
        details: dict[str, torch.Tensor] = engine.state.metric_details  # type: ignore[attr-defined]
        details |= {self.prefix + column: values for column, values in self.metric_fn.details().items()}
        means = self.metric_fn.aggregate()
        engine.state.metrics |= {self.prefix + column: mean for column, mean in means.items()}


class Previews:
    """Write a PNG of the first cases of an evaluation, as they are saved: truth, where there is one, and rendering.

    Args:
        directory: of the pictures.
        key: of the rendering in the engine's output, on the grid of its label.
        vessel_labels: ids of the vessel projection.
        cases: at most so many batches are drawn.
        by_case: one picture `<case>.png` for each case instead of one `epoch_<n>.png` for all.
    """

    def __init__(
        self,
        directory: str,
        *,
        vessel_labels: Sequence[int],
        key: str = Keys.PRED,
        cases: int = 1,
        by_case: bool = False,
    ) -> None:
        self.directory, self.vessel_labels, self.key = Path(directory), vessel_labels, key
        self.cases, self.by_case = cases, by_case
        self._rows: list[tuple[str, np.ndarray, np.ndarray]] = []
        self._drawn = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        # After the engine's own postprocessing, which it attaches first.
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep the first cases."""
        if self._drawn >= self.cases or idist.get_rank() != 0:
            return
        self._drawn += 1
        output, case = engine.state.output[0], engine.state.batch[0]["case"]  # type: ignore[index]
        truth, rendered = output[Keys.LABEL].cpu().numpy(), output[self.key][0].cpu().numpy()
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
        path: of the CSV; a column for every metric of the last evaluation, empty where one is not defined.
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
        rows: list[Mapping[str, Any]] = []
        if self.path.exists():
            written = pd.read_csv(self.path, dtype=str, keep_default_na=False)
            earlier = written[written["epoch"].astype(int) < row["epoch"]]
            rows = earlier.reindex(columns=list(row)).to_dict("records")
        write_table(self.path, [*rows, row])


class LabelTable:
    """Write `<path>` with a row for every case and label, and add what every label comes to, to the engine's metrics.

    Attach before handlers that log metrics. A metric joins through the details that its handler saves.

    Args:
        path: of the CSV; columns `case`, `label` and the metrics; empty where a metric is not defined.
        label_names: one for each id, background first.
        labels: ids of the details, in their order.
        columns: names of the metrics; a label comes to their mean over cases.
        counted: names of further metrics, 0 or 1 in a case, that a label comes to the sum of.
    """

    def __init__(
        self,
        path: str,
        *,
        label_names: Sequence[str],
        labels: Sequence[int],
        columns: Sequence[str],
        counted: Sequence[str] = (),
    ) -> None:
        self.path, self.columns, self.counted = Path(path), [*columns, *counted], set(counted)
        self.names = [label_names[k] for k in labels]
        self._cases: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator of decollated batches."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep the order of the cases."""
        self._cases += [item["case"] for item in engine.state.batch]  # type: ignore[union-attr]

    def write(self, engine: Engine) -> None:
        """Write the table.

        Raises:
            ValueError: when the details of a metric are not of the cases and labels.
        """
        details: Mapping[str, Any] = engine.state.metric_details  # type: ignore[attr-defined]
        rows = [{"case": case, "label": name} for case in self._cases for name in self.names]
        for column in self.columns:
            values = torch.as_tensor(details[column]).cpu().numpy()
            if values.shape != (len(self._cases), len(self.names)):
                raise ValueError(
                    f"columns: {column!r} has details of shape {values.shape}, needed are {len(self._cases)} cases and "
                    f"{len(self.names)} labels"
                )
            for row, value in zip(rows, values.ravel(), strict=True):
                row[column] = "" if np.isnan(value) else f"{value:.{0 if column in self.counted else 4}f}"
            for name, own in zip(self.names, values.T, strict=True):
                known = own[~np.isnan(own)]
                if len(known):
                    engine.state.metrics[f"{column} {name}"] = float(
                        known.sum() if column in self.counted else known.mean()
                    )
        self._cases = []
        write_table(self.path, rows)


class MetricsFile:
    """Write all metrics of an evaluation as one JSON file, last and whole; what is not defined is null.

    Attach after handlers that add metrics.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        if idist.get_rank() == 0:
            write_json(self.path, engine.state.metrics)


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
