"""MLflow, kept in the folder of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

import mlflow
import numpy as np
from custom.runs.files import disk_remedy, process_mark, remove_leftovers
from ignite.engine import Engine
from mlflow.exceptions import MlflowException
from monai.handlers import MLFlowHandler
from sqlalchemy.exc import SQLAlchemyError

EXPERIMENT = "structdiff_cardiac"
_ENVIRONMENT = "MLFLOW_TRACKING_URI"


def tracking_store(output_dir: str | os.PathLike) -> str:
    """URI of the MLflow store `mlflow.db` of an output folder; the store is made when there is something to log.

    Characters that would begin another part of a URI are escaped.
    """
    store = str(Path(output_dir).absolute() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return f"{_SQLITE}{store}"


_SQLITE = "sqlite:///"
_ERRORS = (MlflowException, SQLAlchemyError, OSError)


@contextmanager
def _own_store(tracking_uri: str) -> Iterator[None]:
    """Names a store that fails, and keeps `MLFLOW_TRACKING_URI` of the environment from what is done inside."""
    elsewhere = os.environ.pop(_ENVIRONMENT, None)
    try:
        with _no_escaped_folder(tracking_uri):
            yield
    except _ERRORS as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        if tracking_uri.startswith(_SQLITE):
            where, remedy = str(_file_of(tracking_uri)), _remedy(error, reason)
        else:
            where, remedy = f"tracking_uri {tracking_uri}", "start the server, or leave the option out"
        raise RuntimeError(f"{where}: MLflow cannot log here ({reason}); {remedy}") from error
    finally:
        if elsewhere is not None:
            os.environ[_ENVIRONMENT] = elsewhere


def _remedy(error: Exception, reason: str) -> str:
    """What to do about a store of a folder, by what SQLite says."""
    if isinstance(error, OSError):
        return disk_remedy(error, "output_dir")
    if "readonly" in reason or "unable to open" in reason:
        return "make the folder writable, or choose another output_dir"
    if "full" in reason or "I/O" in reason:
        return "make room there, or choose another output_dir"
    return "move it away: it is a log alone"


@contextmanager
def _no_escaped_folder(tracking_uri: str) -> Iterator[None]:
    """Removes the folders that MLflow makes for a store whose URI has escapes: it takes them for the path."""
    folders = Path(tracking_uri.removeprefix(_SQLITE)).parents if tracking_uri.startswith(_SQLITE) else ()
    absent = [folder for folder in folders if "%" in str(folder) and not folder.exists()]
    try:
        yield
    finally:
        for folder in absent:
            with suppress(OSError):  # not there, or not empty and so not MLflow's
                folder.rmdir()


def _file_of(tracking_uri: str) -> Path:
    return Path(unquote(tracking_uri.removeprefix(_SQLITE)))


def open_store(tracking_uri: str) -> mlflow.MlflowClient:
    """Client of an MLflow store; one of an output folder is made whole or not at all.

    MLflow takes seconds to make its tables: a process killed meanwhile would leave a store that no later run can open.

    Raises:
        RuntimeError: naming a store that is damaged, or that cannot be reached.
    """
    with _own_store(tracking_uri):
        if tracking_uri.startswith(_SQLITE) and not (store := _file_of(tracking_uri)).exists():
            store.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(store.parent)
            with TemporaryDirectory(dir=store.parent, prefix=process_mark("mlflow")) as folder:
                with _no_escaped_folder(tracking_store(folder)):
                    mlflow.MlflowClient(tracking_store(folder))
                (Path(folder) / store.name).replace(store)
        return mlflow.MlflowClient(tracking_uri)


class LogToMLFlow(MLFlowHandler):
    """MONAI's `MLFlowHandler`, whose store the environment does not change: there `MLFLOW_TRACKING_URI` would win.

    Args:
        tracking_uri: of the store, see :func:`open_store`.
        options: of `MLFlowHandler`.

    Raises:
        RuntimeError: naming a store that cannot be written.
    """

    def __init__(self, tracking_uri: str, **options: Any) -> None:
        self.uri = tracking_uri
        open_store(tracking_uri)
        with _own_store(tracking_uri):
            super().__init__(tracking_uri, **options)

    def start(self, engine: Engine) -> None:
        """As MONAI's."""
        with _own_store(self.uri):
            super().start(engine)

    def iteration_completed(self, engine: Engine) -> None:
        """As MONAI's."""
        with _own_store(self.uri):
            super().iteration_completed(engine)

    def epoch_completed(self, engine: Engine) -> None:
        """As MONAI's."""
        with _own_store(self.uri):
            super().epoch_completed(engine)

    def close(self) -> None:
        """As MONAI's."""
        with _own_store(self.uri):
            super().close()


def log_run(
    tracking_uri: str,
    output_dir: str | os.PathLike,
    *,
    run_name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[str | os.PathLike],
) -> None:
    """Log what a stage without an engine made as one MLflow run; artifacts are kept in the output folder.

    Args:
        tracking_uri: of the store, see :func:`open_store`.
        output_dir: of the stage; else artifacts would go to the folder of the caller.
        run_name: of the run.
        params, metrics: numbers that are not finite are left out.
        artifacts: files to copy.
    """
    client = open_store(tracking_uri)  # not mlflow's global state, which is also the environment's
    with _own_store(tracking_uri):
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
