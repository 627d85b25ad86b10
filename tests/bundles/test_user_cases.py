"""Files as users bring them: own numbering, equal names, two places in a header, four axes, other anatomies."""

from __future__ import annotations

import json
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from custom.segmentation.cases import pretraining_cases
from custom.volumes.cases import load_cases
from helpers import BUNDLE, TINY, TINY_COARSE, fails_with, workflow_of
from monai.transforms import Compose
from scipy.ndimage import label as components

SWAP = {"from": [1, 3, 2, 5], "to": [3, 1, 5, 2]}
"""Their 1 is the left ventricle, 2 the right one, 3 the myocardium, 5 the left atrium."""
MYOCARDIUM, VENTRICLE, CORONARIES, VEINS = 1, 3, 9, 10
NO_MLFLOW = {"report#tracking_uri": None}


def ids_of(path):
    return np.asarray(nib.load(path).dataobj)


def place(cohort, folder, change, *, names="{kind}s/s{k}", header=lambda nifti: nifti, forms=("image", "label")):
    """Copies of the phantoms, ids changed, as a list of two training cases, one validation and two test cases."""
    items = []
    for k in range(4):
        item = {}
        for kind in forms:
            source = nib.load(cohort / f"{kind}s/subject_{k:03d}.nii.gz")
            values = np.asarray(source.dataobj)
            path = folder / (names.format(kind=kind, k=k) + ".nii.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(header(nib.Nifti1Image(change(values) if kind == "label" else values, source.affine)), path)
            item[kind] = str(path.relative_to(folder))
        items.append(item)
    lists = {"training": items[:2], "validation": items[2:3], "test": items[2:]}
    (folder / "datalist.json").write_text(json.dumps(lists))
    return folder / "datalist.json"


def theirs(ids):
    """Ids of the phantoms in the numbering that SWAP brings back."""
    new = ids.copy()
    for old, own in zip(SWAP["from"], SWAP["to"], strict=True):
        new[ids == own] = old
    return new


def run(workflow, *names, workflow_type=None, **overrides):
    work = workflow(*names, workflow_type=workflow_type, **overrides)
    work.run()
    work.finalize()


def generate(datalist, output_dir, **overrides):
    options = {"reference_datalist": str(datalist), "output_dir": str(output_dir), "count": 2, **overrides}
    with mock.patch("custom.masks.summary.log_run"):
        run(workflow_of(BUNDLE), "generate_masks.json", **options)


def settings(datalist, weights, tmp_path, **more):
    """Of synthesis with a network that adds 10 HU of noise to the painted prior."""
    options = {
        **TINY,
        **NO_MLFLOW,
        "template_datalist": str(datalist),
        "ckpt_dir": str(weights),
        "confidence_table": str(tmp_path / "confidence.json"),
        "sampling_steps": 2,
        "contrast_shift_hu": 0.0,
        "label_shift_hu": 0.0,
        "gate": {},
        **more,
    }
    return options


def synthesize(workflow, options, output_dir):
    """Calibrate and make a set; mean HU of the labels that the report draws, by group and name."""
    drawn = []
    configs = ("inference.json", "synthesize.json")
    calibration = {key: value for key, value in options.items() if key not in ("mask_datalist", "mask_section")}
    run(workflow, *configs, "calibrate.json", workflow_type="infer", **calibration)
    with mock.patch("custom.synthesis.report.distribution_pictures", side_effect=lambda all: drawn.append(all) or []):
        run(workflow, *configs, workflow_type="infer", **options, output_dir=str(output_dir))
    return {
        group: {name: np.mean([case["mean_hu"][name] for case in cases]) for name in cases[0]["mean_hu"]}
        for group, cases in drawn[0].items()
    }


@pytest.mark.slow
def test_a_swap_of_ids_holds_in_every_stage(workflow, cohort, weights, tmp_path):
    datalist = place(cohort, tmp_path / "data", theirs)
    own = load_cases(str(datalist), "training")
    generate(datalist, tmp_path / "masks", label_mapping=SWAP)
    masks = load_cases(str(tmp_path / "masks/datalist.json"), "training", keys=["label"])
    for case, source in zip(masks, own, strict=True):
        assert case["mapped_label"] is True
        made, given = ids_of(case["label"]), ids_of(source["label"])
        assert 0.6 < (made == MYOCARDIUM).sum() / (given == 3).sum() < 1.6
        assert 0.6 < (made == VENTRICLE).sum() / (given == 1).sum() < 1.6

    options = settings(datalist, weights, tmp_path, label_mapping=SWAP, template_choice="nearest")
    options["mask_datalist"] = str(tmp_path / "masks/datalist.json")
    hu = synthesize(workflow, options, tmp_path / "set")
    assert abs(hu["synthetic"]["LV myocardium"] - hu["templates"]["LV myocardium"]) < 40
    assert hu["templates"]["LV myocardium"] < 200 < hu["templates"]["left ventricle"]
    listed = json.loads((tmp_path / "set/datalist.json").read_text())
    for item in listed["training"] + listed["rejected"]:
        image, label = (ids_of(tmp_path / "set" / item[key]) for key in ("image", "label"))
        assert item["mapped_label"] is True
        assert abs(image[label == MYOCARDIUM].mean() - 105) < 60
        assert image[label == VENTRICLE].mean() > 250


def test_synthetic_and_real_cases_of_pretraining_are_renumbered_once(seg_workflow, cohort, tmp_path):
    real = place(cohort, tmp_path / "data", theirs)
    mapped = place(cohort, tmp_path / "set", lambda ids: ids)
    lists = json.loads(mapped.read_text())
    lists["training"] = [{**item, "mapped_label": True} for item in lists["training"]]
    mapped.write_text(json.dumps(lists))
    parser = seg_workflow("train.json", "pretrain.json", label_mapping=SWAP, synthetic_datalists=[str(mapped)]).parser
    read = Compose(parser.get_parsed_content("read")[:4])
    cases = pretraining_cases(str(mapped), "training", real_datalists=str(real))
    items = [read(case) for case in cases]
    assert len(items) == 4
    assert len({frozenset(item) - {"confidence"} for item in items}) == 1, "batches need the same entries"
    for item, k in zip(items, (0, 1, 0, 1), strict=True):
        np.testing.assert_array_equal(item["label"][0], ids_of(cohort / f"labels/subject_{k:03d}.nii.gz"))


@pytest.mark.slow
def test_equal_names_in_folders_count_each(workflow, seg_workflow, cohort, weights, tmp_path):
    datalist = place(cohort, tmp_path / "data", lambda ids: ids, names="patient_{k}/{kind}")
    generate(datalist, tmp_path / "masks")
    prepared = sorted(path.name for path in (tmp_path / "masks/prepared").glob("*.nii.gz"))
    assert prepared == ["patient_0_label.nii.gz", "patient_1_label.nii.gz"]
    pairs = load_cases(str(datalist), "test")
    templates = [{"image": case["image"], "label": case["label"]} for case in pairs[:1]]
    options = {**TINY, "templates": templates, "ckpt_dir": str(weights), "sampling_steps": 1}
    run(
        workflow,
        "inference.json",
        workflow_type="infer",
        target_masks=[case["label"] for case in pairs],
        output_dir=str(tmp_path / "rendered"),
        **options,
    )
    names = [f"patient_{k}_label_from_image" for k in (2, 3)]
    assert sorted(path.name for path in (tmp_path / "rendered").glob("*.nii.gz")) == [f"{n}.nii.gz" for n in names]
    assert sorted(path.stem for path in (tmp_path / "rendered/pictures").iterdir()) == names
    small = {"spacing_mm": [4.0] * 3, "roi_size": [16] * 3, "network_def#blocks_down": [1, 1]}
    small |= {"network_def#blocks_up": [1], "dataset_dir": str(tmp_path / "data"), "ckpt_dir": str(tmp_path / "models")}
    evaluation = seg_workflow("train.json", "evaluate.json", output_dir=str(tmp_path / "evaluated"), **small)
    (tmp_path / "models").mkdir()
    state = evaluation.parser.get_parsed_content("network_def").state_dict()
    torch.save(state, tmp_path / "models/model.pt")
    evaluation.run()
    table = pd.read_csv(tmp_path / "evaluated/labels.csv")
    assert table["case"].unique().tolist() == ["patient_2_label", "patient_3_label"]
    assert len(table) == 2 * 10
    pictures = sorted(path.stem for path in (tmp_path / "evaluated/pictures").iterdir())
    assert pictures == ["patient_2_label", "patient_3_label"]


def two_places(nifti):
    """Shown 15 mm apart by readers of the qform and of the sform."""
    moved = nifti.affine.copy()
    moved[:3, 3] += [12, -8, 5]
    nifti.set_qform(nifti.affine, code=1)
    nifti.set_sform(moved, code=2)
    return nifti


def by_qform(nifti):
    nifti.set_qform(nifti.affine, code=1)
    nifti.set_sform(None, code=0)
    return nifti


def test_a_header_with_two_places_is_refused_in_every_stage_and_one_form_is_kept(
    workflow, seg_workflow, cohort, weights, tmp_path
):
    datalist = place(cohort, tmp_path / "two", lambda ids: ids, header=two_places)
    rule = "qform and sform must agree to no more than a tenth of a voxel, got a corner 15.3 mm apart"
    with fails_with(rule):
        generate(datalist, tmp_path / "masks")
    assert not (tmp_path / "masks/masks").exists()
    where = {"dataset_dir": str(datalist.parent), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "w")}
    for build in (workflow, seg_workflow):
        with fails_with(rule):
            run(build, "train.json", workflow_type="train", **where)
    pair = load_cases(str(datalist), "test")[0]
    options = {
        **TINY,
        **TINY_COARSE,
        "templates": [],
        "mode": "mask_only",
        "ckpt_dir": str(weights),
        "sampling_steps": 1,
    }
    with fails_with(rule):
        run(
            workflow,
            "inference.json",
            workflow_type="infer",
            target_masks=[pair["label"]],
            **options,
            output_dir=str(tmp_path / "out"),
        )
    assert not [*tmp_path.glob("out/*.nii.gz"), *tmp_path.glob("w/*.pt")]

    generate(place(cohort, tmp_path / "one", lambda ids: ids, header=by_qform), tmp_path / "kept")
    made, source = nib.load(tmp_path / "kept/masks/mask_0000.nii.gz"), nib.load(tmp_path / "one/labels/s0.nii.gz")
    for form in (made.get_qform(), made.get_sform()):
        np.testing.assert_allclose(form, source.get_qform(), atol=1e-4)


@pytest.mark.slow
def test_a_fourth_axis_of_one_is_none_and_all_that_is_written_is_alike(workflow, cohort, weights, tmp_path):
    datalist = place(cohort, tmp_path / "data", lambda ids: ids[..., None], forms=("label",))
    for k in range(4):
        source = nib.load(cohort / f"images/subject_{k:03d}.nii.gz")
        (tmp_path / "data/images").mkdir(exist_ok=True)
        file = tmp_path / f"data/images/s{k}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(source.dataobj)[..., None], source.affine), file)
    lists = json.loads(datalist.read_text())
    for items in lists.values():
        for item in items:
            item["image"] = item["label"].replace("label", "image")
    datalist.write_text(json.dumps(lists))
    generate(datalist, tmp_path / "masks", with_image=True)
    options = settings(datalist, weights, tmp_path, mask_datalist=str(datalist), mask_section="validation")
    synthesize(workflow, options, tmp_path / "set")
    for root, keys in ((tmp_path / "masks", ("image", "label")), (tmp_path / "set", ("image", "label", "confidence"))):
        listed = json.loads((root / "datalist.json").read_text())
        items = listed["training"] + listed.get("rejected", [])
        assert items
        for item in items:
            volumes = [nib.load(root / item[key]) for key in keys]
            assert {volume.shape for volume in volumes} == {(58, 58, 58)}
            for volume in volumes:
                np.testing.assert_allclose(volume.affine, volumes[0].affine, atol=1e-5)


def without_smallest_vein(ids):
    pieces, _ = components(ids == VEINS, np.ones((3, 3, 3)))
    smallest = 1 + int(np.argmin(np.bincount(pieces.ravel())[1:]))
    return np.where(pieces == smallest, 0, ids).astype(np.uint8)


@pytest.mark.slow
def test_the_remedy_for_another_number_of_veins_works_in_the_same_folder(cohort, tmp_path):
    whole = place(cohort, tmp_path / "whole", lambda ids: ids, forms=("label",))
    place(cohort, tmp_path / "cut", without_smallest_vein, forms=("label",))
    mixed = tmp_path / "list.json"
    mixed.write_text(json.dumps({"training": [{"label": f"{name}/labels/s0.nii.gz"} for name in ("whole", "cut")]}))
    out = tmp_path / "out"
    with fails_with("components=3, or keep=true to take it as it is (--anatomy#10#components 3"):
        generate(mixed, out)
    assert not (out / "masks").exists()
    assert (out / "prepared").exists(), "the first reference was prepared, with the options that are given up"
    generate(mixed, out, **{"anatomy#10#components": 3})
    listed = json.loads((out / "datalist.json").read_text())["training"]
    assert len(listed) == 2
    for item in listed:
        assert components(ids_of(out / item["label"]) == VEINS, np.ones((3, 3, 3)))[1] == 3
    with fails_with("belongs to another run"):
        generate(whole, out)


@pytest.mark.slow
def test_coronaries_alone_name_the_options_that_make_them_work_in_the_same_folder(cohort, tmp_path):
    datalist = place(cohort, tmp_path / "data", lambda ids: (ids == CORONARIES).astype(np.uint8), forms=("label",))
    out = tmp_path / "out"
    with fails_with("is a tree of vessels, say so: --anatomy#1#thin True, and --anatomy#1#components N of its pieces"):
        generate(datalist, out)
    vessels = {"anatomy#1#thin": True, "anatomy#1#components": 2}
    with fails_with(
        "a label that is not thin, by which one is registered to the other, and share none; set --neighbours 0"
    ):
        generate(datalist, out, **vessels)
    generate(datalist, out, **vessels, neighbours=0)
    listed = json.loads((out / "datalist.json").read_text())["training"]
    assert len(listed) == 2
    assert all(np.unique(ids_of(out / item["label"])).tolist() == [0, 1] for item in listed)


def test_coronaries_under_their_own_id_name_the_option_that_frees_them_from_the_aorta(cohort, tmp_path):
    datalist = place(cohort, tmp_path / "data", lambda ids: (ids == CORONARIES).astype(np.uint8), forms=("label",))
    mapping = {"label_mapping": {"from": [1], "to": [CORONARIES]}}
    with fails_with('or take 6 out of touches (--anatomy#9#touches "[]")'):
        generate(datalist, tmp_path / "out", **mapping)
    generate(datalist, tmp_path / "out", **mapping, **{"anatomy#9#touches": []}, neighbours=0)
    assert len(json.loads((tmp_path / "out/datalist.json").read_text())["training"]) == 2
