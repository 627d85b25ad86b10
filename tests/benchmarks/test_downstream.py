"""The comparison of segmenters where a weak generator leaves little to compare."""

import json

import downstream
import pytest


@pytest.mark.parametrize(("accepted", "cases"), [(0, 8), (3, 8), (3, 0)])
def test_a_set_that_the_gate_left_too_small_is_named(tmp_path, accepted, cases):
    datalist = tmp_path / "n1_draw0/one_contrast/datalist.json"
    datalist.parent.mkdir(parents=True)
    items = [{"image": f"{k}.nii.gz"} for k in range(accepted)]
    datalist.write_text(json.dumps({"training": items, "rejected": [{"image": "x.nii.gz", "reasons": ["dark"]}]}))
    with pytest.raises(ValueError, match=f"{datalist}: the gate accepted {accepted} volumes, --cases asks for {cases}"):
        downstream.confidence(str(tmp_path), draws=[0], cases=cases)
