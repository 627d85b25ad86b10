"""What is logged to MLflow, and what is left alone."""

import os

import mlflow

from custom.logs import EXPERIMENT, log_run


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
