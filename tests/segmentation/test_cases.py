"""Cases of pre-training: confidence, weights, and real ones among the synthetic."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from custom.segmentation.cases import pretraining_cases, sample_weights


def test_sample_weights_have_mean_1_and_the_stated_ratios():
    weights = sample_weights([10.0, 0.0, 40.0, float("nan"), 10.0])
    assert np.mean(weights) == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(1 / 2)
    assert weights[2] / weights[1] == pytest.approx(1 / 5)
    assert weights[3] == 1, "no score counts as 1"


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [float("nan")] * 3, [7.0, 7.0]])
def test_scores_that_tell_nothing_weigh_alike(scores):
    assert sample_weights(scores) == [1.0] * len(scores)


def test_negative_scores_are_refused():
    with pytest.raises(ValueError, match="scores: must not be negative, got -1"):
        sample_weights([1.0, -1.0])


@pytest.fixture
def lists(tmp_path):
    """A synthetic list of three cases, one bare, and a real one of two."""
    for name in ("a", "b", "c", "r", "s"):
        for kind in ("image", "label", "confidence"):
            (tmp_path / f"{name}_{kind}.nii.gz").write_bytes(b"")

    def item(name, **more):
        return {"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz", **more}

    synthetic = [
        item("a", confidence="a_confidence.nii.gz", score_hu=10.0),
        item("b", confidence="b_confidence.nii.gz", score_hu=30.0),
        item("c"),
    ]
    (tmp_path / "synthetic.json").write_text(json.dumps({"training": synthetic}))
    (tmp_path / "real.json").write_text(json.dumps({"training": [item("r"), item("s", weight=3)]}))
    return str(tmp_path / "synthetic.json"), str(tmp_path / "real.json")


def test_synthetic_cases_bring_confidence_and_weight_and_what_lacks_is_said_once(lists, caplog):
    with caplog.at_level(logging.WARNING):
        cases = pretraining_cases(lists[0], "training")
    assert [("confidence" in case) for case in cases] == [True, True, False]
    assert np.mean([case["sample_weight"] for case in cases]) == pytest.approx(1)
    assert cases[0]["sample_weight"] > cases[1]["sample_weight"]
    assert all("score_hu" not in case for case in cases)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 synthetic cases have no confidence: they count as 1",
        "1 of 3 synthetic cases have no score_hu: they count as 1",
    ]


def test_real_cases_take_their_share_of_the_draws(lists):
    cases = pretraining_cases(*lists[:1], "training", real_datalists=lists[1], real_share=0.4)
    real = [case for case in cases if "score_hu" not in case and case["case"][0] in "rs"]
    assert sum(case["weight"] for case in real) / sum(case["weight"] for case in cases) == pytest.approx(0.4)
    assert real[1]["weight"] == pytest.approx(3 * real[0]["weight"])
    assert [case["sample_weight"] for case in real] == [1.0, 1.0]


def test_all_missing_confidence_maps_are_named_at_once(lists, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}_confidence.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 listed files do not exist: .*a_confidence.*b_confidence"):
        pretraining_cases(lists[0], "training")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_an_impossible_share_is_refused(lists, share):
    with pytest.raises(ValueError, match="real_share: must be between 0 and 1"):
        pretraining_cases(lists[0], "training", real_datalists=lists[1], real_share=share)
