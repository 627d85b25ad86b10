"""Which masks are made already."""

import gzip
import json

import pytest
from custom.masks.cases import is_made

CASE = {"case": "mask_0000"}
MADE = {
    **{"case": "mask_0000", "accepted": True, "source": "a.nii.gz", "retries": 0, "scale": 1.0},
    **{"min_det_jacobian": 0.5, "dice_to_references": [0.8], "volume_ml": {}, "betti": {}},
    **{"wall_thickness_mm": {}, "vessels": {}},
}


@pytest.fixture
def folder(tmp_path):
    for name in ("records", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "records/mask_0000.json").write_text(json.dumps(MADE))
    (tmp_path / "masks/mask_0000.nii.gz").write_bytes(gzip.compress(bytes(range(256)) * 8))
    return tmp_path


def test_a_mask_is_made_with_its_record_and_its_file(folder):
    assert is_made(CASE, str(folder))
    assert not is_made({"case": "mask_0001"}, str(folder))
    assert not is_made({**CASE, "image": "a.nii.gz"}, str(folder)), "its image is not there"


def test_a_refused_mask_needs_no_file(folder):
    (folder / "masks/mask_0000.nii.gz").unlink()
    assert not is_made(CASE, str(folder))
    refusal = {"case": "mask_0000", "accepted": False, "reason": "max_dice"}
    (folder / "records/mask_0000.json").write_text(json.dumps(refusal))
    assert is_made(CASE, str(folder))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"accepted": true, "case": "mask_0000"}', '{"accepted": false}', json.dumps(MADE)[:60]],
)
def test_a_damaged_record_is_named_and_the_mask_made_again(folder, caplog, content):
    (folder / "records/mask_0000.json").write_text(content)
    assert not is_made(CASE, str(folder))
    assert f"{folder}/records/mask_0000.json: is damaged" in caplog.text
    assert "the mask is made again" in caplog.text


@pytest.mark.parametrize("keep", [0, 10, -12])
def test_a_mask_cut_short_is_named_and_made_again(folder, caplog, keep):
    path = folder / "masks/mask_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:keep])
    assert not is_made(CASE, str(folder))
    assert f"{path} is damaged and is made again" in caplog.text
