"""The confidence table as a file: what it must hold."""

import json

import pytest
from custom.confidence.transforms import EstimateConfidenced

WHOLE = {"tau_hu2": [5.0, 7.5], "weights": "abc"}


def estimate(path):
    return EstimateConfidenced(str(path), made_with={"weights": "abc"})


def test_a_whole_table_is_read(tmp_path):
    (tmp_path / "confidence.json").write_text(json.dumps(WHOLE))
    assert estimate(tmp_path / "confidence.json").tau.tolist() == [5.0, 7.5]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(WHOLE)[:20], "is damaged"),
        ("", "is damaged"),
        ("[1, 2]", "is damaged .it must hold one JSON object"),
        (json.dumps({"weights": "abc"}), "is damaged .tau_hu2 must hold a number above 0 for each label, got None"),
        *(
            (json.dumps(WHOLE | {"tau_hu2": tau}), "is damaged .tau_hu2 must hold a number above 0 for each label, got")
            for tau in ([], 5.0, "5", {}, [5, 0.0], [5, -1.0], [5, float("nan")], [5, float("inf")], [5, None])
        ),
    ],
)
def test_a_damaged_table_is_named_with_the_remedy(tmp_path, content, reason):
    path = tmp_path / "confidence.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path}: {reason}.*; calibrate anew \(calibrate.json\), or point"):
        estimate(path)


def test_a_table_of_an_older_version_and_one_of_other_weights_are_told_so(tmp_path):
    path = tmp_path / "confidence.json"
    path.write_text(json.dumps(WHOLE | {"tau_hu2": [[5.0], [7.5]]}))
    with pytest.raises(ValueError, match="was made by an older version"):
        estimate(path)
    path.write_text(json.dumps(WHOLE | {"weights": "xyz"}))
    with pytest.raises(ValueError, match="was made with weights xyz, not abc; calibrate anew"):
        estimate(path)
    with pytest.raises(FileNotFoundError, match="no confidence table; run calibrate.json"):
        estimate(tmp_path / "none.json")
