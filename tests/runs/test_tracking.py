"""What is logged to MLflow, and what is left alone."""

import os
import platform
import subprocess
import sys
import time

import mlflow
import pytest
from custom.runs.tracking import EXPERIMENT, LogToMLFlow, log_run, open_store, tracking_store
from ignite.engine import Engine
from sqlalchemy.exc import OperationalError


def test_a_run_is_logged_whole_and_leaves_the_process_as_it_was(tmp_path):
    before = (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    page = tmp_path / "page.html"
    page.write_text("<p>page</p>")
    for score in (1.5, 2.5):
        metrics = {"score": score, "undefined": float("nan")}
        log_run(uri, tmp_path, run_name="synthesize", params={"seed": 7}, metrics=metrics, artifacts=[page])
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    assert sorted(run.data.metrics["score"] for run in runs) == [1.5, 2.5]
    assert all(set(run.data.metrics) == {"score"} and run.data.params == {"seed": "7"} for run in runs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [f.path for f in client.list_artifacts(runs[0].info.run_id)] == ["page.html"]
    assert (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")) == before


def test_a_store_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    make = mlflow.MlflowClient

    def killed(uri):
        make(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow, "MlflowClient", killed)
    uri = tracking_store(tmp_path / "new/out")
    with pytest.raises(KeyboardInterrupt):
        open_store(uri)
    assert not (tmp_path / "new/out/mlflow.db").exists()
    monkeypatch.setattr(mlflow, "MlflowClient", make)
    open_store(uri).create_experiment("kept")
    open_store(uri)
    assert make(uri).get_experiment_by_name("kept"), "a store that is there must stay"
    assert [path.name for path in (tmp_path / "new/out").iterdir()] == ["mlflow.db"]


def test_the_name_of_a_store_makes_none(tmp_path):
    assert tracking_store(tmp_path / "new").endswith("/mlflow.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["50%25 done", "what?", "a#b", "CT [2024] $x"])
def test_a_store_lies_in_its_folder_whatever_that_is_called(tmp_path, name):
    open_store(tracking_store(tmp_path / name)).create_experiment("kept")
    assert (tmp_path / name / "mlflow.db").stat().st_size > 0
    log_run(tracking_store(tmp_path / name), tmp_path / name, run_name="a", params={}, metrics={}, artifacts=[])
    assert [path.name for path in tmp_path.iterdir()] == [name], "MLflow's folder with escapes in its name must go"
    assert open_store(tracking_store(tmp_path / name)).get_experiment_by_name("kept")


def handler_of(folder, **options):
    """An engine of two iterations that logs its loss there."""
    engine = Engine(lambda engine, batch: 0.5)
    loss = {"output_transform": lambda output: output, "close_on_complete": True}
    LogToMLFlow(tracking_store(folder), experiment_name="x", run_name="train", **loss, **options).attach(engine)
    return engine


def test_a_server_named_in_the_environment_redirects_nothing_and_delays_nothing(tmp_path, monkeypatch):
    open_store(tracking_store(tmp_path))  # whose tables take seconds
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    begun = time.monotonic()
    handler_of(tmp_path).run([0, 1])
    log_run(tracking_store(tmp_path), tmp_path, run_name="masks", params={"seed": 7}, metrics={}, artifacts=[])
    assert time.monotonic() - begun < 20
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:9"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(tracking_store(tmp_path))
    (run,) = client.search_runs(client.get_experiment_by_name("x").experiment_id)
    assert (run.info.run_name, run.info.status, run.data.metrics["Loss"]) == ("train", "FINISHED", 0.5)
    assert client.search_runs(client.get_experiment_by_name(EXPERIMENT).experiment_id)


@pytest.mark.parametrize("spoil", [lambda whole: b"garbage" * 500, lambda whole: whole[: len(whole) // 2]])
def test_a_damaged_store_is_named_with_the_remedy(tmp_path, spoil):
    open_store(tracking_store(tmp_path / "whole"))
    (tmp_path / "mlflow.db").write_bytes(spoil((tmp_path / "whole/mlflow.db").read_bytes()))
    refusal = rf"{tmp_path}/mlflow.db: MLflow cannot log here \(.*\); move it away: it is a log alone"
    with pytest.raises(RuntimeError, match=refusal):
        handler_of(tmp_path)
    with pytest.raises(RuntimeError, match=refusal):
        log_run(tracking_store(tmp_path), tmp_path, run_name="masks", params={}, metrics={}, artifacts=[])


@pytest.mark.parametrize(
    ("call", "reason", "remedy"),
    [
        ("get_experiment_by_name", "database or disk is full", "make room there"),
        ("log_batch", "disk I/O error", "make room there"),
        ("log_batch", "attempt to write a readonly database", "make the folder writable"),
        ("set_terminated", "unable to open database file", "make the folder writable"),
    ],
)
def test_a_disk_that_fails_amid_a_run_is_named_with_the_store(tmp_path, monkeypatch, call, reason, remedy):
    def fail(*args, **kwargs):
        raise OperationalError("INSERT", {}, Exception(reason))

    engine = handler_of(tmp_path)
    monkeypatch.setattr(mlflow.MlflowClient, call, fail)
    refusal = rf"{tmp_path}/mlflow.db: .*{reason}.*; {remedy}, or choose another output_dir"
    with pytest.raises(RuntimeError, match=refusal):
        engine.run([0, 1])


def test_a_server_that_was_asked_for_and_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = "http://127.0.0.1:9"
    with pytest.raises(RuntimeError, match=rf"tracking_uri {address}: MLflow cannot log here .*start the server"):
        log_run(address, tmp_path, run_name="masks", params={}, metrics={}, artifacts=[])


def test_what_a_kill_left_of_a_store_is_removed(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".mlflow_{platform.node()}_{ended.stdout.strip()}_x1"
    left.mkdir()
    (left / "mlflow.db").write_text("half")
    open_store(tracking_store(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
