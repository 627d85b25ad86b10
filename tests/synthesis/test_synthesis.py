"""Synthetic data sets: templates chosen, confidence calibrated, images gated, nothing lost between runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.diffusion.transforms import VaryContrastd
from custom.evaluation.gate import ImageGate, examine_labels, examine_vessels, rejections, vessel_reference
from custom.runs.locks import lock_folder
from custom.synthesis import JudgeRenderingd
from custom.synthesis.cases import synthesis_cases
from custom.volumes.intensity import label_statistics
from helpers import BUNDLE, TINY, fails_with, other_process, template_of, workflow_of
from scipy import ndimage

CONFIGS = ("inference.json", "synthesize.json")
MAPPING = {"from": [11], "to": [0]}
UNREPORTED = {"synthetic_set#report": "$lambda: None"}
"""Of a set whose report is not looked at: its pictures take longer than its images."""


def options(cohort, weights, folder):
    return {
        **TINY,
        "mask_datalist": str(folder / "masks.json"),
        "template_datalist": str(cohort / "datalist.json"),
        "ckpt_dir": str(weights),
        "sampling_steps": 2,
        "strides": [2, 3],
        "contrast_shift_hu": 0.0,
        "label_shift_hu": 0.0,
        "report#tracking_uri": None,
        "gate#min_vessel_contrast": None,
        "gate#min_vessel_continuity": None,
    }


def run(workflow, *names, **overrides):
    work = workflow(*names, workflow_type="infer", **overrides)
    work.run()
    work.finalize()


@pytest.fixture(scope="module")
def masks(cohort, tmp_path_factory):
    """A list of two masks, one with an id that the mapping drops, on an LPS grid."""
    folder = tmp_path_factory.mktemp("masks")
    for index in (2, 3):
        image = nib.load(cohort / f"labels/subject_00{index}.nii.gz")
        label = np.asarray(image.dataobj).astype(np.uint8)[::-1, ::-1].copy()
        label[:3, :3, :3] = 11
        affine = image.affine @ np.diag([-1, -1, 1, 1])
        nib.save(nib.Nifti1Image(label, affine), folder / f"mask_{index}.nii.gz")
    items = [{"label": f"mask_{index}.nii.gz", "source": str(cohort / "labels/subject_001.nii.gz")} for index in (2, 3)]
    (folder / "masks.json").write_text(json.dumps({"training": items}))
    return folder


def calibrated(cohort, weights, masks, folder, **overrides):
    """Options of synthesis with the table that a calibration has written into the folder."""
    settings = options(cohort, weights, masks) | {"confidence_table": str(folder / "confidence.json")} | overrides
    run(workflow_of(BUNDLE), *CONFIGS, "calibrate.json", **settings | {"mask_datalist": str(cohort / "datalist.json")})
    return settings


@pytest.fixture(scope="module")
def settings(cohort, weights, masks, tmp_path_factory):
    """Options of a synthesis whose table is made."""
    return calibrated(cohort, weights, masks, tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A finished set, to look at."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(workflow_of(BUNDLE), *CONFIGS, **settings, output_dir=str(folder), template_choice="source")
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(finished, tmp_path / "out")


def test_gate_and_drawn_contrast_have_the_plausible_ranges_of_the_anatomy(workflow):
    parser = workflow(*CONFIGS, workflow_type="infer").parser
    ranges = parser.get_parsed_content("labels").plausible_hu
    assert len(ranges) == 10
    assert parser.get_parsed_content("gate")["plausible_hu"] == ranges
    drawn = next(part for part in parser.get_parsed_content("appearance") if isinstance(part, VaryContrastd))
    assert drawn.plausible_hu == {k: tuple(map(float, v)) for k, v in ranges.items()}


def test_contrast_varies_in_synthesis_and_not_in_calibration(workflow):
    """Calibration compares with true images, which are not varied."""
    varied, truth = (workflow(*CONFIGS, *more, workflow_type="infer").parser for more in ((), ("calibrate.json",)))
    shifts = varied.get_parsed_content("label_shift_hu")
    assert len(shifts) == varied.get_parsed_content("labels").num_labels
    assert shifts[0] == 0, "the background stays"
    assert min(shifts[1:]) > 0
    assert varied["contrast_shift_hu"] > 0
    assert truth["contrast_shift_hu"] == truth["label_shift_hu"] == 0


def assert_complete(out, masks, method, table):
    """Both masks are rendered from the template that they were made from, on their grid, with a confidence."""
    content = json.loads(Path(table).read_text())
    assert np.shape(content["tau_hu2"]) == (11,)
    assert content["method"] == method
    listed = json.loads((out / "datalist.json").read_text())
    assert len(listed["training"]) == 2
    assert listed["rejected"] == []
    made_with = listed["provenance"]
    assert (made_with["grain"], made_with["sample_strength"]) == (1.0, 0.0)
    for item, index in zip(listed["training"], (2, 3), strict=True):
        assert "from_subject_001" in item["image"]
        assert item["mapped_label"] is True
        image, label, trust = (nib.load(out / item[key]) for key in ("image", "label", "confidence"))
        mask = nib.load(masks / f"mask_{index}.nii.gz")
        for volume in (image, label, trust):
            assert volume.shape == mask.shape
            np.testing.assert_allclose(volume.affine, mask.affine, atol=1e-4)
        ids = np.asarray(mask.dataobj)
        np.testing.assert_array_equal(np.asarray(label.dataobj), np.where(ids == 11, 0, ids))
        values = np.asarray(trust.dataobj)
        assert values.min() >= 0.04
        assert values.max() <= 1.0
        assert 0.5 < (values >= 0.5).mean()
        assert item["score_hu"] >= 0
    assert (out / "report.html").stat().st_size > 50_000


def test_a_set_is_calibrated_synthesized_and_complete(settings, finished, masks):
    assert_complete(finished, masks, "predicted_variance", settings["confidence_table"])


def test_a_set_of_skip_sampling_is_complete(workflow, cohort, weights, masks, tmp_path):
    settings = calibrated(cohort, weights, masks, tmp_path, method="skip_sampling")
    run(workflow, *CONFIGS, **settings, output_dir=str(tmp_path / "out"), template_choice="source")
    assert_complete(tmp_path / "out", masks, "skip_sampling", settings["confidence_table"])


def test_a_second_run_makes_only_what_is_missing_or_damaged(workflow, settings, out):
    again = {**settings, **UNREPORTED, "output_dir": str(out), "template_choice": "source"}
    files = sorted((out / "images").iterdir())
    before = nib.load(files[0]).get_fdata()
    stamp = files[1].stat().st_mtime_ns
    files[0].write_bytes(b"damaged")
    with other_process(lambda: lock_folder(str(out))), fails_with("is at work on part 0 of this run"):
        run(workflow, *CONFIGS, **again)
    assert files[0].read_bytes() == b"damaged"
    run(workflow, *CONFIGS, **again)
    np.testing.assert_array_equal(nib.load(files[0]).get_fdata(), before)
    assert files[1].stat().st_mtime_ns == stamp
    with fails_with("seed: 0 there, 5 now"):
        run(workflow, *CONFIGS, **again, seed=5)


def test_two_processes_make_what_one_makes(workflow, settings, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        more = {"output_dir": str(tmp_path / "two"), "template_choice": "source", "num_workers": int(rank)}
        run(workflow, *CONFIGS, **settings, **UNREPORTED, **more)
        assert len(list((tmp_path / "two/images").iterdir())) == 2 - int(rank)
    one, two = (json.loads((folder / "datalist.json").read_text()) for folder in (finished, tmp_path / "two"))
    assert one == two
    for item in one["training"]:
        for key in ("image", "label", "confidence"):
            values = [np.asarray(nib.load(folder / item[key]).dataobj) for folder in (finished, tmp_path / "two")]
            np.testing.assert_array_equal(*values)


def test_records_tell_of_vessels_as_the_files_show_them(finished, cohort):
    """Within the rounding of the HU that are written."""
    on_grid = {"thin_labels": [9], "spacing_mm": [3.0] * 3}
    own = vessel_reference(*(values(cohort / f"{key}s/subject_001.nii.gz") for key in ("image", "label")), **on_grid)
    for item in json.loads((finished / "datalist.json").read_text())["training"]:
        image, label = (values(finished / item[key]) for key in ("image", "label"))
        expected = examine_vessels(image, label, template=own, **on_grid)
        measures = json.loads((finished / item["record"]).read_text())["measures"]
        assert expected == {name: pytest.approx(measures[name], abs=0.02) for name in expected}


def values(file):
    return np.asarray(nib.load(file).dataobj)


def test_a_changed_mask_is_rendered_anew_and_a_broken_record_too(workflow, settings, masks, out):
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    original = (masks / "mask_2.nii.gz").read_bytes()
    shutil.copy(masks / "mask_3.nii.gz", masks / "mask_2.nii.gz")
    next(iter((out / "records").glob("mask_3*"))).write_text("")
    try:
        run(workflow, *CONFIGS, **settings, **UNREPORTED, output_dir=str(out), template_choice="source")
    finally:
        (masks / "mask_2.nii.gz").write_bytes(original)
    assert all(path.stat().st_mtime_ns > stamp for path, stamp in before.items())


def test_incomplete_cases_are_not_listed(workflow, settings, out):
    again = {**settings, **UNREPORTED, "output_dir": str(out), "template_choice": "source"}
    next((out / "images").glob("mask_3*")).unlink()
    run(workflow, *CONFIGS, **again, shard=0, shards=2)  # the other process's case is broken
    listed = json.loads((out / "datalist.json").read_text())
    assert [item["image"] for item in listed["training"]] == [f"images/{p.name}" for p in (out / "images").iterdir()]
    with fails_with("shard: must be 0 to 1 of 2 shards, got 2"):
        run(workflow, *CONFIGS, **again, shard=2, shards=2)


def test_only_renderings_from_templates_make_a_set(workflow, cohort, weights, masks, tmp_path):
    with fails_with("a synthetic data set is made in mode 'template' or 'painted', got 'mask_only'"):
        run(workflow, *CONFIGS, **options(cohort, weights, masks), output_dir=str(tmp_path / "out"), mode="mask_only")


def test_a_template_without_contrast_in_its_vessels_cannot_ask_for_any():
    image, label = painted(vessel_hu=-60.0)
    means = [*MEANS[:9], -70.0, np.nan]
    measures = examined(image, label, template_statistics=table(means), template=None, thin_labels=[9])
    assert np.isnan(measures["vessel_contrast"])
    assert np.isnan(measures["vessel_continuity"])
    assert rejections(measures, 5.0, ImageGate.from_config({"plausible_hu": None})) == []


def test_what_the_gate_rejects_is_kept_apart_with_its_reason(workflow, settings, tmp_path):
    strict = {**settings, **UNREPORTED, "gate#plausible_hu": {"3": [900, 1000]}}
    run(workflow, *CONFIGS, **strict, output_dir=str(tmp_path / "out"))
    listed = json.loads((tmp_path / "out/datalist.json").read_text())
    assert listed["training"] == []
    for item in listed["rejected"]:
        assert item["reasons"][0].startswith("plausible_hu: label 3 has ")
        assert (tmp_path / "out" / item["image"]).is_file()
        assert item["image"].startswith("rejected/images/")


def test_tables_that_are_missing_or_of_other_weights_are_refused(workflow, settings, weights, tmp_path):
    settings, made = {**settings, "confidence_table": str(tmp_path / "c.json")}, settings["confidence_table"]
    with fails_with("c.json: no confidence table; run calibrate.json with these weights first"):
        run(workflow, *CONFIGS, **settings, output_dir=str(tmp_path / "out"))
    shutil.copy(made, tmp_path / "c.json")
    with fails_with("was made with method predicted_variance, not skip_sampling"):
        run(workflow, *CONFIGS, **settings, output_dir=str(tmp_path / "out"), method="skip_sampling")
    with fails_with("was made with calls [2], not [3]"):
        run(workflow, *CONFIGS, **{**settings, "sampling_steps": 3}, output_dir=str(tmp_path / "out"))
    with fails_with("was made with sample_strength 0.0, not 1.0"):
        run(workflow, *CONFIGS, **{**settings, "sample_strength": 1.0}, output_dir=str(tmp_path / "out"))
    with fails_with("was made with spacing_mm [3.0, 3.0, 3.0], not [4.0, 4.0, 4.0]"):
        run(workflow, *CONFIGS, **{**settings, "spacing_mm": [4.0] * 3}, output_dir=str(tmp_path / "out"))
    shutil.copytree(weights, tmp_path / "other")
    state = torch.load(tmp_path / "other/model.pt", weights_only=True)
    torch.save({k: v + 1 for k, v in state.items()}, tmp_path / "other/model.pt")
    with fails_with("was made with weights "):
        run(workflow, *CONFIGS, **{**settings, "ckpt_dir": str(tmp_path / "other")}, output_dir=str(tmp_path / "out"))
    table = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(table | {"tau_hu2": [[tau] * 5 for tau in table["tau_hu2"]]}))
    with fails_with("was made by an older version, by label and edge distance; calibrate anew"):
        run(workflow, *CONFIGS, **settings, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def cases_of(cohort, choice, **changes):
    masks = [{"label": str(cohort / f"labels/subject_00{k}.nii.gz"), "source": "x/subject_000.nii.gz"} for k in (2, 3)]
    templates = [template_of(cohort, f"subject_00{k}") for k in (0, 1, 2)]
    settings = {"images_per_mask": 1, "seed": 0, "num_labels": 11, "label_mapping": MAPPING, **changes}
    return [c["case"] for c in synthesis_cases(masks, templates, choice=choice, **settings)]


def test_templates_are_chosen_as_asked(cohort):
    assert cases_of(cohort, "source") == ["subject_002_from_subject_000", "subject_003_from_subject_000"]
    assert cases_of(cohort, "nearest")[0] == "subject_002_from_subject_002"
    assert len(cases_of(cohort, "all")) == 6
    drawn = cases_of(cohort, "random", images_per_mask=2)
    assert drawn == cases_of(cohort, "random", images_per_mask=2)
    assert len(set(drawn)) == 4
    assert any(cases_of(cohort, "random", seed=s) != cases_of(cohort, "random") for s in range(1, 6))


@pytest.mark.parametrize(
    ("choice", "changes", "message"),
    [
        ("best", {}, r"template_choice: must be one of \('source', 'nearest', 'random', 'all'\), got 'best'"),
        ("random", {"images_per_mask": 4}, r"images_per_mask: must be 1 to the 3 templates, got 4"),
    ],
)
def test_impossible_choices_are_refused(cohort, choice, changes, message):
    with pytest.raises(ValueError, match=message):
        cases_of(cohort, choice, **changes)


def test_a_mask_without_a_template_of_its_source_is_refused(cohort):
    mask = {"label": str(cohort / "labels/subject_002.nii.gz"), "source": "elsewhere/patient_7.nii.gz"}
    with pytest.raises(
        ValueError, match=r"0 templates, not one, have the label elsewhere/patient_7.nii.gz that it was"
    ):
        synthesis_cases(
            [mask],
            [template_of(cohort)],
            choice="source",
            images_per_mask=1,
            seed=0,
            num_labels=11,
            label_mapping=MAPPING,
        )


def painted(vessel_hu=300.0, chamber_hu=400.0):
    label = np.zeros((30, 30, 30), np.int64)
    label[3:12, 3:12, 3:12] = 3
    label[20:22, 20:22, 4:26] = 9
    image = np.full(label.shape, -60.0, np.float32)
    image[label == 3], image[label == 9] = chamber_hu, vessel_hu
    return image, label


def examined(image, label, *, template_statistics, template, thin_labels):
    """All that is measured of an image on the grid of its template, whose vessels have the mean of the statistics."""
    statistics, on_grid = np.asarray(template_statistics), {"thin_labels": thin_labels, "spacing_mm": [1.5] * 3}
    own = vessel_reference(*(template or painted()), **on_grid)
    own = own._replace(mean_hu=float(statistics[thin_labels, 0].mean()))
    labels = examine_labels(
        image,
        label,
        template_statistics=template_statistics,
        template_image=template[0] if template else None,
        thin_labels=thin_labels,
    )
    return labels | examine_vessels(image, label, template=own, **on_grid)


def table(means):
    """Means with an SD of 10 HU each."""
    return [[mean, 10.0] for mean in means]


MEANS = [-60.0, np.nan, np.nan, 400.0, *[np.nan] * 5, 300.0, np.nan]


def test_measures_of_a_perfect_image_are_those_of_its_template():
    image, label = painted()
    measures = examined(image, label, template_statistics=table(MEANS), template=None, thin_labels=[9])
    assert measures["label_error_hu"] == {3: pytest.approx(0)}
    assert measures["vessel_contrast"] == pytest.approx(1)
    assert measures["vessel_continuity"] == 1
    assert np.isnan(measures["template_copy"])
    assert rejections(measures, 5.0, ImageGate()) == []


def test_faint_broken_and_copied_images_are_named():
    image, label = painted(vessel_hu=60.0)
    image[20:22, 20:22, 14:26] = -60
    noise = np.random.default_rng(0).normal(0, 20, image.shape).astype(np.float32)
    measures = examined(
        image + noise, label, template_statistics=table(MEANS), template=(image + noise, label), thin_labels=[9]
    )
    gate = ImageGate(plausible_hu={3: (500.0, 600.0)}, max_score_hu=3.0)
    names = [line.split(":")[0] for line in rejections(measures, 5.0, gate)]
    assert names == [
        "plausible_hu",
        "min_vessel_contrast",
        "min_vessel_continuity",
        "max_template_copy",
        "max_score_hu",
    ]
    off = ImageGate(None, None, {}, None, None, None, None)
    assert rejections(measures, 5.0, off) == []


def test_vessels_one_voxel_wide_are_continuous_too():
    label = np.zeros((20, 20, 30), np.int64)
    label[10, 10, 3:27] = 9
    image = np.where(label == 9, 300.0, -60.0).astype(np.float32)
    measures = examined(image, label, template_statistics=table(MEANS), template=None, thin_labels=[9])
    assert measures["vessel_continuity"] == 1
    image[10, 10, 12:18] = -60
    measures = examined(image, label, template_statistics=table(MEANS), template=None, thin_labels=[9])
    assert measures["vessel_continuity"] == pytest.approx(1 - 6 / 24, abs=2.1 / 24)


def test_an_image_need_not_show_more_of_its_vessels_than_its_template():
    image, label = painted()
    image[20:22, 20:22, 15:26] = -60  # half of the branch has faded, in the image and in the template
    means = [*MEANS[:9], float(image[label == 9].mean()), np.nan]
    alone, beside = (
        examined(image, label, template_statistics=table(means), template=template, thin_labels=[9])
        for template in (None, (image, label))
    )
    assert alone["vessel_continuity"] == pytest.approx(0.5, abs=0.06)
    assert beside["vessel_continuity"] == 1


NATIVE_MM = 0.5


def native(vessel_hu=320.0):
    """A coronary of 2 mm that winds beside a chamber, in voxels of 0.5 mm."""
    x, y, z = np.meshgrid(*[NATIVE_MM * np.arange(n) for n in (60, 63, 90)], indexing="ij")
    label = np.zeros(x.shape, np.int64)
    label[x < 8] = 3
    label[(x - 17 - 3 * np.sin(z / 8)) ** 2 + (y - 15 - 3 * np.cos(z / 8)) ** 2 < 1] = 9
    image = np.select([label == 9, label == 3], [vessel_hu, 400.0], -80.0)
    return (image + np.random.default_rng(0).normal(0, 20, image.shape)).astype(np.float32), label


def through_model(image):
    """An image in voxels of 0.5 mm as it comes back from a grid of 1.5 mm: blocks are averaged, then interpolated."""
    blocks = ndimage.uniform_filter(image, 3)[1::3, 1::3, 1::3]
    return ndimage.zoom(blocks, 3, order=1, mode="nearest", grid_mode=True).astype(np.float32)


def test_vessels_that_blur_away_on_the_grid_of_the_mask_are_rejected():
    image, label = native()
    on_grid = {"thin_labels": [9], "spacing_mm": [NATIVE_MM] * 3}
    own = vessel_reference(image, label, **on_grid)
    assert own.mean_hu == pytest.approx(320, abs=1)
    assert own.continuity == 1
    sharp, blurred = (
        examine_vessels(volume, label, template=own, **on_grid) for volume in (image, through_model(image))
    )
    assert sharp == {"vessel_contrast": pytest.approx(1), "vessel_continuity": 1}
    assert blurred["vessel_contrast"] < 0.5
    assert blurred["vessel_continuity"] < 0.4


def test_vessels_are_judged_as_written_and_labels_as_drawn(tmp_path):
    """Mask and template are files in voxels of 0.5 mm, with the id that the user has for vessels; axes are turned."""
    image, label = native()
    files = {key: str(tmp_path / f"{key}.nii.gz") for key in ("image", "label")}
    affine = np.diag([-NATIVE_MM, NATIVE_MM, NATIVE_MM, 1])
    nib.save(nib.Nifti1Image(image, affine), files["image"])
    nib.save(nib.Nifti1Image(np.where(label == 9, 12, label).astype(np.uint8), affine), files["label"])
    case = {"case": "a", "label": files["label"], "template_image": files["image"], "template_label": files["label"]}
    coarse = [torch.from_numpy(volume[1::3, 1::3, 1::3].copy())[None] for volume in (image, label)]
    item = {"case": "a", "score": 1.0, "label": coarse[1], "drawn": coarse[0], "template_image": coarse[0].flip(3)}
    item["statistics"] = label_statistics(*coarse, 11)
    limits = {"plausible_hu": None, "max_label_sd_ratio": None}
    mapping = {"from": [12], "to": [9]}
    judge = JudgeRenderingd(limits, thin_labels=[9], cases=[case], label_mapping=mapping)
    sharp, blurred = (judge({**item, "pred": torch.from_numpy(v)[None]}) for v in (image, through_model(image)))
    assert sharp["rejected"] == []
    assert sharp["measures"]["vessel_contrast"] == pytest.approx(1)
    assert [line.split(":")[0] for line in blurred["rejected"]] == ["min_vessel_contrast", "min_vessel_continuity"]
    assert sharp["measures"]["label_error_hu"] == blurred["measures"]["label_error_hu"] == {3: 0.0}
    Path(files["image"]).unlink()  # what is known of the template is not read again
    varied = judge({**item, "pred": torch.from_numpy(image)[None], "mean_change_hu": torch.full((11,), 100.0)})
    assert varied["measures"]["vessel_contrast"] == pytest.approx(400 / 500, abs=0.01)


def test_a_label_drowned_in_noise_is_named():
    image, label = painted()
    noise = np.random.default_rng(0).normal(0, 30, image.shape).astype(np.float32)
    measures = examined(image + noise, label, template_statistics=table(MEANS), template=None, thin_labels=[9])
    assert measures["label_sd_ratio"] == {3: pytest.approx(3, rel=0.1)}
    assert [line.split(" times")[0] for line in rejections(measures, 5.0, ImageGate())] == [
        f"max_label_sd_ratio: label 3 has {measures['label_sd_ratio'][3]:.1f}"
    ]


def test_a_label_off_its_template_is_named():
    image, label = painted(chamber_hu=300.0)
    measures = examined(image, label, template_statistics=table(MEANS), template=None, thin_labels=[9])
    assert rejections(measures, 5.0, ImageGate()) == ["max_label_error_hu: label 3 is -100 HU off its template"]


def test_unknown_limits_are_refused():
    with pytest.raises(ValueError, match=r"gate: \['max_scor'\] do not exist; the limits are \['max_label_error_hu'"):
        ImageGate.from_config({"max_scor": 3})
    assert ImageGate.from_config({"plausible_hu": {"3": [1, 2]}}).plausible_hu == {3: (1.0, 2.0)}
