"""What is logged to MLflow, and what is left alone."""

import os

import mlflow
import pytest

from custom.runs.tracking import EXPERIMENT, log_run, tracking_store


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
    with pytest.raises(KeyboardInterrupt):
        tracking_store(tmp_path / "new/out")
    assert not (tmp_path / "new/out/mlflow.db").exists()
    monkeypatch.setattr(mlflow, "MlflowClient", make)
    uri = tracking_store(tmp_path / "new/out")
    make(uri).create_experiment("kept")
    assert tracking_store(tmp_path / "new/out") == uri
    assert make(uri).get_experiment_by_name("kept"), "a store that is there must stay"
    assert [path.name for path in (tmp_path / "new/out").iterdir()] == ["mlflow.db"]


def test_one_process_of_several_makes_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert tracking_store(tmp_path).endswith("/mlflow.db")
    assert not list(tmp_path.iterdir())
