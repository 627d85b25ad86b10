"""`generate_masks.json` on files: what it writes, what it refuses, that it goes on where it stopped."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from custom.masks.cases import generation_cases
from custom.runs.locks import lock_folder
from custom.volumes.anatomy import Anatomy
from helpers import BUNDLE, CONFIGS, assert_kept, fails_with, other_process
from monai.bundle import ConfigWorkflow

LPS = np.diag([-2.5, -2.5, 2.5, 1.0])
OBLIQUE = np.array([[2.4, -0.3, 0.0, 7.0], [0.3, 2.4, 0.2, -80.0], [0.0, -0.2, 2.5, 33.0], [0, 0, 0, 1]])


def generate(datalist, output_dir, *, summary=False, **overrides):
    """Run the config in this process; without its MLflow run, which takes seconds, unless the summary is asked for."""
    options = {"count": 2, "reference_section": "training", "motion#retries": 8, **overrides}
    run = ConfigWorkflow(
        config_file=str(CONFIGS / "generate_masks.json"),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        workflow_type=None,
        bundle_root=str(BUNDLE),
        reference_datalist=str(datalist),
        output_dir=str(output_dir),
        **options,
    )
    run.initialize()
    with contextlib.nullcontext() if summary else mock.patch("custom.masks.summary.log_run"):
        run.run()
    run.finalize()


def masks(folder):
    return {path.name: nib.load(path) for path in sorted((Path(folder) / "masks").glob("*.nii.gz"))}


def values(image):
    return np.asarray(image.dataobj)


@pytest.fixture(scope="module")
def made(cohort, tmp_path_factory):
    """Three masks with images from two references."""
    folder = tmp_path_factory.mktemp("made") / "out"
    generate(cohort / "datalist.json", folder, count=3, with_image=True, summary=True)
    return folder


def test_everything_that_is_promised_is_written(made, cohort):
    assert list(masks(made)) == [f"mask_000{k}.nii.gz" for k in range(3)]
    datalist = json.loads((made / "datalist.json").read_text())
    assert len(datalist["training"]) == 3
    for item in datalist["training"]:
        assert not [key for key in item if key.startswith(("image_", "label_"))]
        assert (made / item["label"]).is_file()
        image, label = nib.load(made / item["image"]), nib.load(made / item["label"])
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.affine, label.affine)
        record = json.loads((made / item["record"]).read_text())
        assert record["accepted"]
        assert record["source"] == item["source"]
        assert record["min_det_jacobian"] >= 0.1
        assert set(record["betti"]) == {str(k) for k in np.unique(values(label))[1:]}
    assert datalist["provenance"]["config_hash"] == json.loads((made / "generation.json").read_text())["config_hash"]
    with (made / "summary.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["mask_0000", "mask_0001", "mask_0002"]
    assert {p.name for p in (made / "prepared").iterdir()} == {
        f"subject_00{k}{ending}" for k in (0, 1) for ending in (".nii.gz", ".json")
    }
    for file in ("pictures/masks.png", "mlflow.db"):
        assert (made / file).stat().st_size > 1000


def test_masks_lie_on_the_grid_of_their_reference_and_keep_its_topology(made, cohort):
    for k, image in enumerate(masks(made).values()):
        source = nib.load(made / "prepared" / f"subject_00{k % 2}.nii.gz")
        np.testing.assert_allclose(image.affine, nib.load(cohort / f"labels/subject_00{k % 2}.nii.gz").affine)
        heart = Anatomy(json.loads((CONFIGS / "generate_masks.json").read_text())["anatomy"]).structures
        assert_kept(values(image), values(source), heart)
        assert (values(image) != values(source)).mean() > 0.01


def test_deformed_images_show_their_deformed_masks(made):
    for name, label in masks(made).items():
        image = values(nib.load(made / "images" / name)).astype(float)
        blood = image[np.isin(values(label), [2, 3])].mean()
        muscle = image[values(label) == 1].mean()
        assert blood > muscle + 80, (blood, muscle)


def test_two_processes_make_what_one_makes_and_a_second_run_adds(made, cohort, tmp_path):
    generate(cohort / "datalist.json", tmp_path / "out", count=1, with_image=True)
    stamp = (tmp_path / "out/masks/mask_0000.nii.gz").stat().st_mtime_ns
    generate(cohort / "datalist.json", tmp_path / "out", count=3, with_image=True, workers=2)
    assert (tmp_path / "out/masks/mask_0000.nii.gz").stat().st_mtime_ns == stamp
    for name, image in masks(tmp_path / "out").items():
        np.testing.assert_array_equal(values(image), values(masks(made)[name]))
        images = [values(nib.load(folder / "images" / name)) for folder in (made, tmp_path / "out")]
        np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["LPS", "oblique"])
def test_axes_and_affine_are_those_of_the_file(cohort, tmp_path, affine):
    label = values(nib.load(cohort / "labels/subject_000.nii.gz"))
    nib.save(nib.Nifti1Image(label[::-1, ::-1] if affine is LPS else label, affine), tmp_path / "a.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"label": "a.nii.gz"}]}))
    generate(tmp_path / "list.json", tmp_path / "out", count=1)
    (image,) = masks(tmp_path / "out").values()
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    new = values(image)
    source = values(nib.load(tmp_path / "a.nii.gz"))
    for k in (1, 3, 6):  # not flipped: a flipped heart would lie elsewhere
        centres = [np.argwhere(volume == k).mean(0) for volume in (new, source)]
        assert np.linalg.norm(centres[0] - centres[1]) * 2.5 < 25


def test_a_chosen_spacing_and_references_of_different_grids(cohort, tmp_path):
    label = values(nib.load(cohort / "labels/subject_001.nii.gz"))
    fine = np.repeat(label, 2, axis=2)[:, 2:]
    nib.save(nib.Nifti1Image(fine, np.diag([2.5, 2.5, 1.25, 1.0])), tmp_path / "fine.nii.gz")
    shutil.copy(cohort / "labels/subject_000.nii.gz", tmp_path / "plain.nii.gz")
    datalist = {"training": [{"label": "plain.nii.gz"}, {"label": "fine.nii.gz"}]}
    (tmp_path / "list.json").write_text(json.dumps(datalist))
    generate(tmp_path / "list.json", tmp_path / "own")
    zooms = [image.header.get_zooms() for image in masks(tmp_path / "own").values()]
    np.testing.assert_allclose(zooms, [[2.5, 2.5, 2.5], [2.5, 2.5, 1.25]])
    generate(tmp_path / "list.json", tmp_path / "chosen", spacing_mm=[2.4, 2.4, 2.4])
    for image in masks(tmp_path / "chosen").values():
        np.testing.assert_allclose(image.header.get_zooms(), [2.4, 2.4, 2.4], atol=1e-4)


def test_what_is_rejected_is_told_at_the_end_and_the_rest_is_kept(cohort, tmp_path):
    strict = {"motion#retries": 0, "gate#max_dice": 0.05}
    with fails_with("2 of 2 masks were not accepted (mask_0000, mask_0001)"):
        generate(cohort / "datalist.json", tmp_path / "out", summary=True, **strict)
    record = json.loads((tmp_path / "out/records/mask_0000.json").read_text())
    assert not record["accepted"]
    assert "max_dice" in record["reason"]
    assert not (tmp_path / "out/masks").exists()
    assert json.loads((tmp_path / "out/datalist.json").read_text())["training"] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"count": 0}, "count: must be a whole number of at least 1, got 0; for example --count 2"),
        ({"seed": -1}, "seed: must be a whole number from 0 to 4294967295, got -1; for example --seed 0"),
        ({"motion#fine_mm": -2}, "motion: fine_mm must not be negative, got -2"),
        ({"edits#prune_probability": 2}, "edits: prune_probability must be 0 to 1"),
        (
            {"spacing_mm": 2.5},
            "spacing_mm: must be three lengths in mm above 0, one for each axis, or two, the finest and the coarsest, "
            "got 2.5; for example --spacing_mm",
        ),
        ({"gate#max_dise": 0.5}, "gate: ['max_dise'] do not exist"),
        ({"motion#coarse": 4}, "motion: ['coarse'] do not exist; the options are ['coarse_mm'"),
        ({"anatomy#9#toches": [6]}, "anatomy: row 9 has unknown columns ['toches']"),
        ({"neighbours": -1}, "neighbours: must be a whole number of at least 0, got -1; for example --neighbours 0"),
        ({"reference_section": "trainig"}, "no case in section 'trainig'"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(cohort, tmp_path, overrides, message):
    with fails_with(message):
        generate(cohort / "datalist.json", tmp_path / "out", **overrides)
    assert not (tmp_path / "out").exists()


def test_an_image_that_does_not_fit_its_mask_is_refused(cohort, tmp_path):
    shutil.copy(cohort / "labels/subject_000.nii.gz", tmp_path / "label.nii.gz")
    image, affine = values(nib.load(cohort / "images/subject_000.nii.gz")), np.diag([2.5, 2.5, 2.5, 1.0])
    for name, volume, message in (
        ("shifted", nib.Nifti1Image(image, affine + np.eye(4, k=3) * 500), "must share one grid"),
        ("windowed", nib.Nifti1Image(image.clip(0, 255), affine), "are not Hounsfield units"),
    ):
        nib.save(volume, tmp_path / f"{name}.nii.gz")
        case = {"image": f"{name}.nii.gz", "label": "label.nii.gz"}
        (tmp_path / "list.json").write_text(json.dumps({"training": [case]}))
        with fails_with(message):
            generate(tmp_path / "list.json", tmp_path / name, with_image=True)
        assert not (tmp_path / name / "masks").exists()


def test_damaged_masks_records_and_registrations_are_made_again_alike(made, cohort, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    spoilt = [*(tmp_path / "out/cache").glob("*.pt"), tmp_path / "out/masks/mask_0000.nii.gz"]
    assert len(spoilt) > 1
    for path in [*spoilt, tmp_path / "out/records/mask_0001.json"]:
        path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "out/masks/mask_0001.nii.gz").unlink()
    generate(cohort / "datalist.json", tmp_path / "out", count=3, with_image=True)
    assert list(masks(tmp_path / "out")) == list(masks(made))
    for name, mask in masks(made).items():
        np.testing.assert_array_equal(values(masks(tmp_path / "out")[name]), values(mask))


def test_a_damaged_account_of_the_run_is_named_and_nothing_is_made(made, cohort, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "out/generation.json").write_text("{")
    (tmp_path / "out/masks/mask_0000.nii.gz").unlink()
    with fails_with(f"{tmp_path}/out/generation.json: is damaged"):
        generate(cohort / "datalist.json", tmp_path / "out", count=3, with_image=True)
    assert len(masks(tmp_path / "out")) == 2


def test_a_deleted_mask_is_made_again_and_a_smaller_count_forgets_none(made, cohort, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    before = values(masks(made)["mask_0001.nii.gz"])
    (tmp_path / "out/masks/mask_0001.nii.gz").unlink()
    with other_process(lambda: lock_folder(str(tmp_path / "out"))), fails_with("is at work on part 0 of this run"):
        generate(cohort / "datalist.json", tmp_path / "out", count=2, with_image=True)
    assert not (tmp_path / "out/masks/mask_0001.nii.gz").exists()
    generate(cohort / "datalist.json", tmp_path / "out", count=2, with_image=True, summary=True)
    np.testing.assert_array_equal(values(masks(tmp_path / "out")["mask_0001.nii.gz"]), before)
    assert len(json.loads((tmp_path / "out/datalist.json").read_text())["training"]) == 3


def test_a_reference_that_changed_since_is_another_run(cohort, tmp_path):
    shutil.copy(cohort / "labels/subject_000.nii.gz", tmp_path / "a.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"label": "a.nii.gz"}]}))
    generate(tmp_path / "list.json", tmp_path / "out", count=1)
    shutil.copy(cohort / "labels/subject_001.nii.gz", tmp_path / "a.nii.gz")
    with fails_with("belongs to another run (references: "):
        generate(tmp_path / "list.json", tmp_path / "out", count=2)


def test_a_program_error_is_not_taken_for_a_rejection(cohort, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr("custom.masks.generator.exponentiate", fail)
    with fails_with("can't allocate memory"):
        generate(cohort / "datalist.json", tmp_path / "out")
    assert not list((tmp_path / "out").glob("records/*"))


def test_a_run_that_needs_more_memory_than_there_is_says_so_and_what_to_change(made, cohort, tmp_path, monkeypatch):
    """Also one that goes on, whose references are prepared already."""
    shutil.copytree(made, tmp_path / "out")
    said = []
    monkeypatch.setattr("custom.runs.memory.machine_memory", lambda: 1 << 20)
    monkeypatch.setattr("custom.runs.memory.logger.warning", lambda text, *values: said.append(text % values))
    generate(cohort / "datalist.json", tmp_path / "out", count=4, with_image=True)
    assert said
    assert all("of memory, the machine has 0; set `spacing_mm` to what" in warning for warning in said)


def spoiled(label, how):
    label = label.astype(np.float32)
    if how == "interpolated":
        label[30, 30, 30] += 0.5
    elif how == "unknown id":
        label[0, 0, 0] = 99
    elif how == "one voxel":
        label[label == 8] = 0
        label[2, 2, 2] = 8
    elif how == "third coronary":
        label[2:5, 2:5, 2:5] = 9
    elif how == "loose coronary":
        label[label == 6] = 0
        label[2:9, 2:9, 2:9] = 6
    return label


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("interpolated", "label ids must be integers"),
        ("unknown id", "label ids [99] are not in the label map 0 to 10"),
        ("one voxel", "label 8 (left atrial appendage) has 1 voxels, at least 8 are needed"),
        ("loose coronary", "0 of 2 components touch label 6, all must"),
    ],
)
def test_references_that_cannot_serve_are_refused_by_file_and_label(cohort, tmp_path, how, message):
    label = spoiled(values(nib.load(cohort / "labels/subject_000.nii.gz")), how)
    nib.save(nib.Nifti1Image(label, np.diag([2.5, 2.5, 2.5, 1.0])), tmp_path / "bad.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"label": "bad.nii.gz"}]}))
    with fails_with(message):
        generate(tmp_path / "list.json", tmp_path / "out")
    with fails_with("bad.nii.gz"):
        generate(tmp_path / "list.json", tmp_path / "out")
    assert not (tmp_path / "out/masks").exists()


def test_specks_are_cleaned_and_the_report_says_so(cohort, tmp_path):
    label = spoiled(values(nib.load(cohort / "labels/subject_000.nii.gz")), "third coronary")
    nib.save(nib.Nifti1Image(label.astype(np.uint8), np.diag([2.5, 2.5, 2.5, 1.0])), tmp_path / "speck.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"label": "speck.nii.gz"}]}))
    generate(tmp_path / "list.json", tmp_path / "out", count=1)
    row = json.loads((tmp_path / "out/prepared/speck.json").read_text())["labels"]["9"]
    assert row["betti_before"] == [3, 0, 0]
    assert row["betti_after"] == [2, 0, 0]


def test_folders_of_other_runs_and_with_other_content_are_left_alone(made, cohort, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    with fails_with("seed: 0 there, 1 now"):
        generate(cohort / "datalist.json", made, seed=1, with_image=True)
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    (tmp_path / "notes.txt").write_text("mine")
    with fails_with("holds other files (notes.txt, ...)"):
        generate(cohort / "datalist.json", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_references_of_one_name_are_refused():
    references = [{"case": "a", "label": "x/a.nii.gz"}, {"case": "a", "label": "y/a.nii.gz"}]
    with pytest.raises(ValueError, match=r"references: file names must differ, they give \['a'\] more than once"):
        generation_cases(references, "out", count=2, neighbours=1)


def test_a_mask_has_one_source_whatever_the_count():
    references = [{"case": c, "label": f"{c}.nii.gz"} for c in "abc"]
    few, many = (generation_cases(references, "out", count=n, neighbours=1) for n in (4, 9))
    source = {case["case"]: case for case in many}
    assert all(source[case["case"]] == case for case in few)
    assert [case["index"] for case in few] == [0, 3, 1, 2]  # those of one source together
    assert few[0]["neighbours"] == ["out/prepared/b.nii.gz"]
