"""Cases looked at: twenty bad ones in a folder are all found, each with what to do; good ones are let through."""

from __future__ import annotations

import json
import shutil
from functools import partial

import nibabel as nib
import numpy as np
import pytest
from custom.study.bundles import find_bundles
from custom.study.cases import cases_in, listed_cases, write_datalist
from custom.study.checking import check_case, check_cases, compare_cases
from helpers import ROOT, run_module
from scipy import ndimage

SIZE, MM = 44, 2.0
AFFINE = np.diag([MM, MM, MM, 1.0])


def heart(seed):
    """HU and ids (44, 44, 44): both ventricles, the left one in its wall, in fat with air around."""
    rng = np.random.default_rng(seed)
    grid = np.indices((SIZE,) * 3) + rng.uniform(-1, 1, (3, 1, 1, 1))
    left, right = (np.linalg.norm((grid.T - centre).T, axis=0) for centre in ([20, 20, 22], [20, 33, 22]))
    ids = np.zeros((SIZE,) * 3, np.uint8)
    ids[right < 5.5 + rng.uniform(0, 1)] = 5
    ids[left < 9] = 1
    ids[left < 6 + rng.uniform(0, 1)] = 3
    ids[(np.hypot(grid[0] - 20, grid[1] - 20) < 4) & (grid[2] > 22) & (grid[2] < 34)] = 3  # out through its base
    hu = np.choose(ids, [-80.0, 105, 0, 400, 0, 330]) + rng.normal(0, 15, ids.shape)
    hu[:4] = -1000
    return hu + ndimage.gaussian_filter(rng.normal(0, 300, ids.shape), 2), ids


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def write_case(root, name, hu=None, ids=None, affine=AFFINE, label_affine=None, seed=0):
    image, label = heart(seed)
    save(root / f"images/{name}.nii.gz", image if hu is None else hu, affine)
    save(
        root / f"labels/{name}.nii.gz",
        (label if ids is None else ids),
        affine if label_affine is None else label_affine,
    )


def bad_folder(root):
    """Twenty-one cases, none of which can be used, name -> what the check must say of it."""
    hu, ids = heart(0)
    wanted = {}

    def bad(fragment, name, **case):
        wanted[name] = fragment
        write_case(root, name, seed=len(wanted), **case)

    def changed(where, value):
        values = hu.copy()
        values[where] = value
        return values

    bad("holds NaN or infinite voxels; replace them", "nan", hu=changed((20, 20, 20), np.nan))
    bad("holds NaN or infinite voxels; replace them", "infinite", hu=changed((20, 20, 20), np.inf))
    bad("a constant image cannot be used, export the scan anew", "constant", hu=np.full_like(hu, 40))
    bad("apply the rescale slope and intercept", "eight_bit", hu=np.clip((hu + 200) / 4, 0, 255).astype(np.uint8))
    bad("apply the rescale slope and intercept", "unsigned", hu=(hu + 1100).clip(0).astype(np.uint16))
    bad("do not window or normalise", "normalised", hu=(hu - hu.min()) / np.ptp(hu))
    bad("split time series", "two_phases", hu=np.stack([hu, hu], -1))
    bad("correct the spacing in the header (mm)", "metres", affine=np.diag([MM / 1000] * 3 + [1]))
    bad("use finer data", "thick_slices", affine=np.diag([MM, MM, 6.0, 1]))
    moved = AFFINE.copy()
    moved[:3, 3] = 9
    bad("they must share one grid", "moved_label", label_affine=moved)
    bad("they must share one grid", "other_size", ids=ids[:-2])
    bad("map or drop them with `label_mapping`", "unknown_ids", ids=np.where(ids == 5, 17, ids).astype(np.uint8))
    bad("label ids must be integers", "interpolated", ids=ndimage.gaussian_filter(ids.astype(np.float32), 1))
    bad("every case needs at least one label", "empty", ids=np.zeros_like(ids))
    swapped = np.choose(ids, [0, 3, 0, 1, 0, 5]).astype(np.uint8)
    bad("renumber them (`label_mapping` in a file named by --overrides)", "swapped", ids=swapped)
    vessel = ids.copy()
    vessel[20, 30:42, 35] = vessel[21, 30:42, 35] = 9
    bad("--anatomy#9#components 1", "one_coronary", ids=vessel)
    for name, fragment, forms in (
        ("two_forms", "qform and sform must agree", (1, 2)),
        ("no_form", "the header must say where the volume lies", (0, 0)),
    ):
        bad(fragment, name)
        for kind in ("images", "labels"):
            image = nib.load(root / f"{kind}/{name}.nii.gz")
            again = nib.Nifti1Image(np.asarray(image.dataobj), None, header=image.header)
            again.set_qform(AFFINE, code=forms[0])
            again.set_sform(moved, code=forms[1])
            nib.save(again, root / f"{kind}/{name}.nii.gz")
    bad("the file is damaged", "cut_short")
    whole = (root / "images/cut_short.nii.gz").read_bytes()
    (root / "images/cut_short.nii.gz").write_bytes(whole[: len(whole) // 2])
    bad("there is no such file; correct its name, or put it there", "no_label")
    (root / "labels/no_label.nii.gz").unlink()
    bad("only NIfTI files are read", "other_format")
    (root / "images/other_format.nii.gz").rename(root / "images/other_format.nrrd")
    return wanted


@pytest.fixture(scope="module")
def labels():
    return find_bundles().labels()


def test_every_bad_case_of_a_folder_is_refused_with_what_to_do(tmp_path, labels, caplog):
    caplog.set_level("INFO")
    wanted = bad_folder(tmp_path)
    assert len(wanted) >= 20
    found = {case.case: case for case in check_cases(str(tmp_path), *labels, out=str(tmp_path / "check.json"))}
    assert found.keys() == wanted.keys()
    for name, fragment in wanted.items():
        assert any(fragment in line for line in found[name].refused), (name, found[name].refused)
        assert found[name].verdict == "refused"
    assert f"{len(wanted)} of {len(wanted)} cases will be refused" in caplog.text
    rows = {row["case"]: row for row in json.loads((tmp_path / "check.json").read_text())["cases"]}
    assert rows["nan"]["refused"] == found["nan"].refused


def test_a_good_case_is_described_and_what_it_lacks_is_a_note(tmp_path, labels):
    write_case(tmp_path, "a")
    found = check_case(cases_in(str(tmp_path))[0], *labels, reference=True)
    assert not found.refused
    assert found.verdict == "look"
    assert found.row["voxels"] == "44 x 44 x 44"
    assert found.row["mm"] == "2 x 2 x 2"
    assert found.row["field_mm"] == "88 x 88 x 88"
    assert found.row["axes"] == "RAS"
    assert found.row["labels"] == "3 of 10"
    assert found.row["contrast"].startswith("both sides")
    assert found.row["pieces"] == "3"
    assert abs(found.means_hu["left ventricle"] - 400) < 40
    assert "has no label 2 (left atrium)" in found.notes[0]


def test_axes_and_voxel_sizes_are_those_of_the_file(tmp_path, labels):
    flipped = np.array([[0, -1.5, 0, 0], [-1.2, 0, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1.0]])
    write_case(tmp_path, "a", affine=flipped)
    row = check_case(cases_in(str(tmp_path))[0], *labels, reference=False).row
    assert (row["axes"], row["mm"]) == ("PLS", "1.2 x 1.5 x 2.5")


@pytest.mark.parametrize(
    ("right_hu", "left_hu", "phase"), [(330, 400, "both sides"), (120, 400, "left"), (90, 150, "little")]
)
def test_the_phase_is_read_from_the_ventricles(tmp_path, labels, right_hu, left_hu, phase):
    hu, ids = heart(0)
    hu[ids == 3], hu[ids == 5] = left_hu, right_hu
    write_case(tmp_path, "a", hu=hu)
    found = check_case(cases_in(str(tmp_path))[0], *labels, reference=False)
    assert found.row["contrast"].startswith(phase)
    assert any("arterial phase" in note for note in found.notes) == (phase == "little")


def test_a_heart_cut_off_is_noted(tmp_path, labels):
    hu, ids = heart(0)
    write_case(tmp_path, "a", hu=hu[:, 14:], ids=ids[:, 14:])
    notes = check_case(cases_in(str(tmp_path))[0], *labels, reference=False).notes
    assert any(note.startswith("LV myocardium: cut off by the edge") for note in notes)


def test_the_same_file_twice_is_refused_and_a_near_copy_noted(tmp_path, labels):
    for name, seed in (("a", 0), ("b", 1)):
        write_case(tmp_path, name, seed=seed)
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / f"{kind}/a.nii.gz", tmp_path / f"{kind}/c.nii.gz")
    hu, ids = heart(0)
    write_case(tmp_path, "d", hu=hu + np.random.default_rng(5).normal(0, 10, hu.shape), ids=ids)
    cases = [check_case(case, *labels, reference=False) for case in cases_in(str(tmp_path))]
    compare_cases(cases)
    a, b, c, d = cases
    assert c.refused == ["a and c: the same image; list it once"]
    assert any("a and d: the same label map" in note for note in d.notes)
    assert not [line for case in (a, b, d) for line in case.refused]
    write_case(tmp_path, "d", hu=hu + np.random.default_rng(5).normal(0, 10, hu.shape), ids=np.where(ids == 5, 4, ids))
    cases = [check_case(case, *labels, reference=False) for case in cases_in(str(tmp_path))]
    compare_cases(cases)
    assert any("a and d: nearly the same heart" in note for note in cases[3].notes)
    assert not [note for case in cases for note in case.notes if " and b" in note or note.startswith("b and")]


def test_own_overrides_count(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"anatomy#9#components": 1, "label_mapping": {"from": [1, 3], "to": [3, 1]}}))
    labels, mapping = find_bundles(overrides=str(own)).labels()
    assert labels.structures[9].components == 1
    assert labels.structures[10].components == 4
    assert mapping == {"from": [1, 3], "to": [3, 1]}
    hu, ids = heart(0)
    write_case(tmp_path, "a", ids=np.choose(ids, [0, 3, 0, 1, 0, 5]).astype(np.uint8))
    assert not check_case(cases_in(str(tmp_path))[0], labels, mapping, reference=False).refused
    own.write_text("[1]")
    with pytest.raises(ValueError, match="overrides: .*own.json must be a JSON dictionary"):
        find_bundles(overrides=str(own))


def test_a_folder_becomes_a_datalist_whose_last_case_tests(tmp_path):
    for name in "abcd":
        write_case(tmp_path, name)
    write_datalist(cases_in(str(tmp_path)), tmp_path / "datalist.json")
    listed = [(case["case"], case["section"]) for case in listed_cases(str(tmp_path / "datalist.json"))]
    assert listed == [("a", "training"), ("b", "training"), ("c", "validation"), ("d", "test")]
    with pytest.raises(ValueError, match="2 cases: at least 3 are needed"):
        write_datalist(cases_in(str(tmp_path))[:2], tmp_path / "few.json")


def test_folders_and_lists_without_cases_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="put each image in HU under images/NAME.nii.gz"):
        cases_in(str(tmp_path))
    (tmp_path / "list.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="no case in training, validation, test"):
        listed_cases(str(tmp_path / "list.json"))
    with pytest.raises(FileNotFoundError, match="or name the folder: --bundles FOLDER"):
        find_bundles(str(tmp_path))


def test_the_command_exits_with_1_where_a_case_is_refused_and_0_else(tmp_path, monkeypatch, caplog):
    write_case(tmp_path, "a")
    caplog.set_level("INFO")
    check = partial(run_module, monkeypatch, ROOT, "custom.study", "check", str(tmp_path))
    assert not check()
    write_case(tmp_path, "b", ids=np.zeros((SIZE,) * 3, np.uint8))
    assert check() == 1
    assert "1 of 2 cases will be refused" in caplog.text
