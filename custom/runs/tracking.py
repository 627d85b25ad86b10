"""MLflow, kept in the folder of the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np

EXPERIMENT = "structdiff_cardiac"


def tracking_store(output_dir: str | os.PathLike) -> str:
    """URI of the MLflow store `mlflow.db` of an output folder, which is made whole or not at all.

    MLflow takes seconds to make its tables: a process killed meanwhile would leave a store that no later run can open.
    Processes of a rank above 0 make nothing.
    """
    store = Path(output_dir).absolute() / "mlflow.db"
    if not store.exists() and int(os.environ.get("RANK", 0)) == 0:
        store.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=store.parent, prefix=".mlflow_") as folder:
            unfinished = Path(folder) / store.name
            mlflow.MlflowClient(f"sqlite:///{unfinished}")
            unfinished.replace(store)
    return f"sqlite:///{store}"


def log_run(
    tracking_uri: str | Callable[[], str],
    output_dir: str | os.PathLike,
    *,
    run_name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[str | os.PathLike],
) -> None:
    """Log what a stage without an engine made as one MLflow run; artifacts are kept in the output folder.

    Args:
        tracking_uri: of MLflow, or a function that gives it: a store is made only when there is something to log.
        output_dir: of the stage; else artifacts would go to the folder of the caller.
        run_name: of the run.
        params, metrics: numbers that are not finite are left out.
        artifacts: files to copy.
    """
    # A client, not mlflow's global state: that is also the environment's, and MONAI's handler heeds it first.
    client = mlflow.MlflowClient(tracking_uri() if callable(tracking_uri) else tracking_uri)
    known = client.get_experiment_by_name(EXPERIMENT)
    place = (Path(output_dir) / "mlartifacts").resolve().as_uri()
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, artifact_location=place)
    run = client.create_run(experiment, run_name=run_name).info.run_id
    for name, value in params.items():
        client.log_param(run, name, value)
    for name, value in metrics.items():
        if np.isfinite(value):
            client.log_metric(run, name, value)
    for artifact in artifacts:
        client.log_artifact(run, str(artifact))
    client.set_terminated(run)
