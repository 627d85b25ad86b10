"""Segmenters beside each other."""

import csv

import numpy as np
import pytest
from custom.evaluation.comparison import (
    case_differences,
    label_differences,
    label_table,
    paired_table,
    read_evaluations,
)

NAN = float("nan")


def write(folder, rows, columns=("case", "label", "dice", "hd95_mm")):
    folder.mkdir(exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(folder)


@pytest.fixture
def evaluations(tmp_path):
    first = [("a", "heart", 0.5, 4.0), ("a", "vessel", 0.25, ""), ("b", "heart", 0.75, 2.0), ("b", "vessel", 0.5, 6.0)]
    other = [("a", "heart", 1.0, 3.0), ("a", "vessel", 0.5, 8.0), ("b", "heart", 0.5, 4.0), ("b", "vessel", 1.0, 5.0)]
    return {"first": write(tmp_path / "first", first), "other": write(tmp_path / "other", other)}


def test_values_are_read_by_case_and_label_and_gaps_are_nan(evaluations):
    read = read_evaluations(evaluations)
    assert list(read) == ["first", "other"]
    assert read["first"].loc["b", "vessel"].to_dict() == {"dice": 0.5, "hd95_mm": 6.0}
    assert np.isnan(read["first"].loc["a", "vessel"]["hd95_mm"])


def test_a_label_has_its_mean_over_the_cases_that_define_it(evaluations):
    columns, rows = label_table(read_evaluations(evaluations), "hd95_mm")
    assert columns == ["label", "first", "other"]
    assert rows == [["heart", 3.0, 3.5], ["vessel", 6.0, 6.5]]


def test_differences_are_paired_by_case_and_better_means_lower_for_distances(evaluations):
    columns, rows = paired_table(
        read_evaluations(evaluations), [("dice", None), ("dice", "vessel"), ("hd95_mm", "heart")]
    )
    assert columns == ["measure", "segmenter", "mean", "minus first", "cases better"]
    assert rows[0] == ["dice, all labels", "first", 0.5, 0.0, ""]
    assert rows[1] == ["dice, all labels", "other", 0.75, 0.25, "2 of 2"]
    assert rows[3] == ["dice, vessel", "other", 0.75, 0.375, "2 of 2"]
    assert rows[5] == ["hd95_mm, heart", "other", 3.5, 0.5, "1 of 2"]


def test_a_measure_that_no_label_has_is_left_out(tmp_path):
    folder = write(tmp_path / "x", [("a", "heart", 0.5, "")])
    assert label_table(read_evaluations({"x": folder}), "hd95_mm")[1] == []


def test_an_evaluation_that_is_missing_or_of_other_cases_is_named(evaluations, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"labels.csv: no evaluation of 'third'; run evaluate.json"):
        read_evaluations({**evaluations, "third": str(tmp_path / "nowhere")})
    odd = write(tmp_path / "odd", [("a", "heart", 0.5, 4.0)])
    with pytest.raises(ValueError, match=r"labels.csv: its cases or labels are not those of 'first'"):
        read_evaluations({**evaluations, "odd": odd})


def test_differences_are_taken_where_both_are_defined_and_the_rest_is_counted(tmp_path):
    """The first has no distance for the hard case, so its own mean is better; compared it is not."""
    rows = {
        "first": [("easy", "vessel", 0.5, 4.0), ("hard", "vessel", 0.0, "")],
        "other": [("easy", "vessel", 0.5, 3.0), ("hard", "vessel", 0.25, 20.0)],
    }
    read = read_evaluations({name: write(tmp_path / name, own) for name, own in rows.items()})
    _, table = paired_table(read, [("hd95_mm", "vessel"), ("hd95_mm", None)])
    assert [table[k][2:] for k in (0, 1)] == [[4.0, 0.0, ""], [11.5, -1.0, "1 of 1, 1 not comparable"]]
    assert table[3][2:] == table[1][2:]


def test_labels_are_compared_one_by_one_before_their_mean(tmp_path):
    """The first lacks the distance of the vessel; the other's worse mean comes from that alone."""
    rows = {
        "first": [("a", "heart", 1, 2.0), ("a", "vessel", 1, "")],
        "other": [("a", "heart", 1, 1.0), ("a", "vessel", 1, 9.0)],
    }
    read = read_evaluations({name: write(tmp_path / name, own) for name, own in rows.items()})
    _, table = paired_table(read, [("hd95_mm", None)])
    assert table[1][2:] == [5.0, -1.0, "1 of 1"]


def test_misses_add_up_by_label_and_fewer_are_better(tmp_path):
    columns = ("case", "label", "missed")
    rows = {
        "first": [("a", "heart", 0), ("a", "vessel", 1), ("b", "heart", 1), ("b", "vessel", 1)],
        "other": [("a", "heart", 0), ("a", "vessel", 0), ("b", "heart", 0), ("b", "vessel", 1)],
    }
    read = read_evaluations({name: write(tmp_path / name, own, columns) for name, own in rows.items()})
    assert label_table(read, "missed")[1] == [["heart", 1.0, 0.0], ["vessel", 2.0, 1.0]]
    assert paired_table(read, [("missed", None)])[1][1][2:] == [0.5, -1.0, "2 of 2"]


def test_differences_of_every_case_stand_label_by_label_with_their_spread(evaluations):
    read = read_evaluations(evaluations)
    by_case = case_differences(read["other"], read["first"], "dice")
    assert by_case.columns.tolist() == ["heart", "vessel"]
    assert by_case.loc["a"].tolist() == [0.5, 0.25]
    assert by_case.loc["b"].tolist() == [-0.25, 0.5]
    columns, rows = label_differences(read, "dice")
    assert columns == ["label", "segmenter", "mean minus first", "SD over cases", "cases better"]
    assert [row[:3] + row[4:] for row in rows] == [
        ["heart", "other", 0.125, "1 of 2"],
        ["vessel", "other", 0.375, "2 of 2"],
    ]
    assert rows[0][3] == pytest.approx(0.75 / np.sqrt(2))
    rows = label_differences(read, "hd95_mm")[1]
    assert [row[4] for row in rows] == ["1 of 2", "1 of 1"]  # lower is better, and one case lacks it
    assert np.isnan(rows[1][3])  # a single case has no spread
