"""Folds: every case tests once and teaches nothing there; tables by hand."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from custom.study.folds import summarise, write_folds


def cases(number):
    return [
        {"image": f"/i/{k}.nii.gz", "label": f"/l/{k}.nii.gz", "case": str(k), "weight": 1.0} for k in range(number)
    ]


@pytest.mark.parametrize(("number", "folds"), [(5, 5), (7, 3), (3, 3), (4, 2)])
def test_every_case_tests_once_and_is_in_no_other_section_of_its_fold(tmp_path, number, folds):
    tested = []
    for path in write_folds(cases(number), tmp_path, folds):
        listed = json.loads(path.read_text())
        images = {section: [item["image"] for item in items] for section, items in listed.items()}
        assert sorted(sum(images.values(), [])) == [case["image"] for case in cases(number)]
        assert len(images["validation"]) == 1
        assert images["training"]
        tested += images["test"]
    assert sorted(tested) == [case["image"] for case in cases(number)]


def test_other_cases_validate_in_other_folds(tmp_path):
    lists = [json.loads(path.read_text()) for path in write_folds(cases(5), tmp_path, 5)]
    assert [items["validation"][0]["image"] for items in lists] == [f"/i/{k}.nii.gz" for k in (1, 2, 3, 4, 0)]


@pytest.mark.parametrize("folds", [1, 6, 2.5])
def test_another_number_of_folds_than_cases_allow_is_refused(tmp_path, folds):
    with pytest.raises(ValueError, match="folds: must be 2 to the number of cases, 5"):
        write_folds(cases(5), tmp_path, folds)


def test_folds_that_leave_nothing_to_learn_from_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave none to learn from"):
        write_folds(cases(2), tmp_path, 2)


def test_means_spread_and_paired_differences_are_over_the_cases_of_all_folds(tmp_path):
    folders = []
    for fold, values in enumerate(
        [{"real_only": (0.5, 0.7), "cal": (0.6, 0.8)}, {"real_only": (0.8, 0.8), "cal": (0.8, 1)}]
    ):
        folders.append(tmp_path / f"fold_{fold}")
        for arm, dice in values.items():
            rows = [
                {"case": "seg", "label": label, "dice": d, "cl_dice": "", "hd95_mm": 2.0, "missed": 0, "invented": 0}
                for label, d in zip(("a", "b"), dice, strict=True)
            ]
            (folders[-1] / arm / "evaluation").mkdir(parents=True)
            pd.DataFrame(rows).to_csv(folders[-1] / arm / "evaluation/labels.csv", index=False)
    text = summarise(folders, tmp_path)
    overall = pd.read_csv(tmp_path / "cross_validation.csv").set_index("measure")
    assert overall.loc["dice", "real cases only, mean"] == pytest.approx(0.7)
    assert overall.loc["dice", "CAL, then real cases, mean"] == pytest.approx(0.8)
    assert overall.loc["dice", "difference, mean"] == pytest.approx(0.1)
    assert overall.loc["dice", "difference, sd"] == pytest.approx(0.0, abs=1e-12)
    assert overall.loc["dice", "real cases only, sd"] == pytest.approx(0.2 / 2**0.5)
    assert "dice" in text
    labels = pd.read_csv(tmp_path / "cross_validation_labels.csv")
    row = labels[(labels["measure"] == "dice, b") & (labels["segmenter"] == "CAL, then real cases")].iloc[0]
    assert row["mean"] == pytest.approx(0.9)
    assert row["cases better"] == "2 of 2"
    assert "as shipped" not in set(labels["segmenter"])


def test_the_shipped_segmenter_stands_beside_both_where_a_study_starts_from_it(tmp_path):
    for arm, dice in {"real_only": 0.5, "cal": 0.75, "shipped": 0.25}.items():
        folder = tmp_path / "fold_1" / arm / "evaluation"
        folder.mkdir(parents=True)
        row = {"case": "seg", "label": "a", "dice": dice, "cl_dice": "", "hd95_mm": 2.0, "missed": 0, "invented": 0}
        pd.DataFrame([row]).to_csv(folder / "labels.csv", index=False)
    summarise([tmp_path / "fold_1"], tmp_path)
    dice = pd.read_csv(tmp_path / "cross_validation.csv").set_index("measure").loc["dice"]
    assert dice["as shipped, mean"] == 0.25
    assert dice["difference, mean"] == 0.25
