"""Handlers of an evaluation: what joins the engine's metrics, and the tables that are left."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from custom.evaluation.handlers import LabelTable, MetricColumns, MetricsFile, MetricsTable
from custom.evaluation.labels import TopologyMetric
from ignite.engine import Engine

NAN = float("nan")


def test_columns_join_metrics_and_details_by_their_own_names():
    truth = torch.zeros(1, 1, 9, 9, 9)
    truth[..., 2:4, 2:4, 2:4], truth[..., 6:8, 6:8, 6:8] = 1, 2
    prediction = truth.clone()
    prediction[..., 0, 0, 8] = 2
    engine = Engine(lambda engine, pair: pair)
    metric = TopologyMetric(["cl_dice", "betti_error_0"], labels=[1, 2], thin_labels=[2])
    MetricColumns(metric, lambda pair: pair, prefix="vessel_").attach(engine, "topology")
    engine.run([(prediction, truth), (truth, truth)])
    assert list(engine.state.metrics) == ["vessel_cl_dice", "vessel_betti_error_0"]
    assert all(type(value) is float for value in engine.state.metrics.values()), "loggers take plain numbers only"
    assert engine.state.metrics["vessel_betti_error_0"] == 0.25
    details = engine.state.metric_details
    assert details["vessel_betti_error_0"].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert details["vessel_cl_dice"].isnan().tolist() == [[True, False], [True, False]]
    engine.run([(truth, truth)])
    assert engine.state.metrics["vessel_betti_error_0"] == 0, "each run starts anew"


def state_of(metrics, epoch):
    return SimpleNamespace(state=SimpleNamespace(metrics=metrics, epoch=epoch))


def test_rows_of_repeated_epochs_are_replaced_and_columns_are_those_of_the_last(tmp_path):
    table = MetricsTable(str(tmp_path / "metrics.csv"))
    table(state_of({"old": 1.0, "dice": 0.1 + 0.2}, 1))
    table(state_of({"old": 1.0, "dice": 0.5}, 2))
    table(state_of({"dice": 0.75, "new": NAN}, 2))
    table(state_of({"dice": 1e-5, "new": 3.0}, 4))
    expected = ["epoch,dice,new", "1,0.30000000000000004,", "2,0.75,", "4,1e-05,3.0", ""]
    assert (tmp_path / "metrics.csv").read_bytes() == "\r\n".join(expected).encode()


def table_of(folder, details, **options):
    """Engine and table after two cases."""
    table = LabelTable(str(folder / "labels.csv"), label_names=["background", "ventricle", "vessel"], **options)
    state = SimpleNamespace(metrics={}, metric_details=details, batch=[{"case": "a"}])
    table.collect(SimpleNamespace(state=state))
    state.batch = [{"case": "b"}]
    table.collect(SimpleNamespace(state=state))
    table.write(SimpleNamespace(state=state))
    return state


def test_the_table_has_a_row_for_every_case_and_label_and_means_join_the_metrics(tmp_path):
    details = {
        "dice": torch.tensor([[0.5, NAN], [1.0, NAN]]),
        "cl_dice": torch.tensor([[NAN, 0.25], [NAN, 0.75]]),
        "other": torch.zeros(3),
    }
    state = table_of(tmp_path, details, labels=[1, 2], columns=["dice", "cl_dice"])
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("a", "ventricle", "0.5000", ""),
        ("a", "vessel", "", "0.2500"),
        ("b", "ventricle", "1.0000", ""),
        ("b", "vessel", "", "0.7500"),
    ]
    assert state.metrics == {"dice ventricle": 0.75, "cl_dice vessel": 0.5}


def test_details_of_other_cases_or_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'dice' has details of shape \(1, 2\), needed are 2 cases and 2 labels"):
        table_of(tmp_path, {"dice": torch.zeros(1, 2)}, labels=[1, 2], columns=["dice"])


def test_counts_of_a_label_add_up_and_are_whole_numbers(tmp_path):
    details = {"dice": torch.tensor([[0.5, 0.0], [1.0, 0.0]]), "missed": torch.tensor([[0.0, 1.0], [0.0, 1.0]])}
    state = table_of(tmp_path, details, labels=[1, 2], columns=["dice"], counted=["missed"])
    with (tmp_path / "labels.csv").open(newline="") as file:
        assert [row["missed"] for row in csv.DictReader(file)] == ["0", "1", "0", "1"]
    assert state.metrics["missed ventricle"] == 0
    assert state.metrics["missed vessel"] == 2


def test_metrics_are_written_as_json_in_which_nothing_is_nan(tmp_path):
    MetricsFile(str(tmp_path / "new/metrics.json"))(state_of({"dice": 0.5, "hd95_mm": NAN}, 1))
    text = (tmp_path / "new/metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"dice": 0.5, "hd95_mm": None}
