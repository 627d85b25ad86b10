"""`measure_set.json` on files, and what it says about a set that holds copies."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from custom.evaluation import gathering
from custom.evaluation.sets import measure_set
from helpers import TINY, fails_with, smooth_volume, template_of
from monai.data import MetaTensor

CONFIGS = ("inference.json", "synthesize.json", "measure_set.json")


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    """What the network answers is tested in test_realism.py."""
    monkeypatch.setattr(gathering, "_PATCHES", 2)


def write_case(folder, name, image, label, template, *, score_hu=5.0):
    """Files and record of a synthetic case."""
    paths = {key: f"{key}s/{name}.nii.gz" for key in ("image", "label", "confidence")}
    volumes = {"image": image.astype(np.int16), "label": label, "confidence": np.ones(label.shape, np.float32)}
    affine = nib.load(template["label"]).affine
    for key, path in paths.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volumes[key], affine), folder / path)
    measures = {"label_error_hu": {"3": 4.0}, "vessel_contrast": 0.9, "vessel_continuity": 0.9, "template_copy": 0.9}
    record = {"case": name, "rejected": [], "score_hu": score_hu, "measures": measures, "template": template}
    (folder / "records").mkdir(exist_ok=True)
    (folder / f"records/{name}.json").write_text(json.dumps({**record, "paths": paths}))
    return {**paths, "record": f"records/{name}.json"}


@pytest.fixture
def planted(cohort, tmp_path):
    """Two synthetic cases: a training case with noise, and another one in a mirror."""
    items, rng = [], np.random.default_rng(0)
    for name, subject, turned in (("copy", "subject_000", False), ("mirrored", "subject_001", True)):
        template = template_of(cohort, subject)
        image, label = (np.asarray(nib.load(template[key]).dataobj) for key in ("image", "label"))
        if turned:
            image, label = image[::-1], label[::-1]
        items.append(write_case(tmp_path, name, image + rng.normal(0, 20, image.shape), label, template))
    provenance = {"config_hash": "x"}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items, "rejected": [], "provenance": provenance}))
    return tmp_path


def test_labels_of_sets_and_templates_are_read_as_their_lists_say(workflow, cohort, planted):
    """Under a swap, only what is not yet in the ids of the model is renumbered."""
    theirs = planted / "theirs"
    theirs.mkdir()
    swap, lists = {"from": [1, 3], "to": [3, 1]}, json.loads((cohort / "datalist.json").read_text())
    for item in (item for items in lists.values() if isinstance(items, list) for item in items):
        source = nib.load(cohort / item["label"])
        ids = np.asarray(source.dataobj)
        own = np.where(ids == 1, 3, np.where(ids == 3, 1, ids)).astype(np.uint8)
        item["image"], item["label"] = str(cohort / item["image"]), item["label"].split("/")[-1]
        nib.save(nib.Nifti1Image(own, source.affine), theirs / item["label"])
    (theirs / "datalist.json").write_text(json.dumps(lists))
    made = json.loads((planted / "datalist.json").read_text())
    made["training"] = [{**item, "mapped_label": True} for item in made["training"]]
    (planted / "datalist.json").write_text(json.dumps(made))
    for name, item in (("copy", 0), ("mirrored", 1)):
        record = json.loads((planted / f"records/{name}.json").read_text())
        record["template"] = template_of(cohort, f"subject_00{item}") | {"mapped_label": True}
        (planted / f"records/{name}.json").write_text(json.dumps(record))
    plain = measure(workflow, cohort, planted)
    swapped = measure(workflow, cohort, planted, template_datalist=str(theirs / "datalist.json"), label_mapping=swap)
    assert swapped["kernel_distance"] == plain["kernel_distance"]
    assert swapped["largest_shifts"] == plain["largest_shifts"]


def measure(workflow, cohort, folder, **overrides):
    settings = {"template_datalist": str(cohort / "datalist.json"), "output_dir": str(folder), **TINY}
    settings |= {"report#tracking_uri": None, "measures#tracking_uri": None, "classifier_steps": 2, **overrides}
    run = workflow(*CONFIGS, workflow_type="infer", **settings)
    run.run()
    run.finalize()
    return json.loads((folder / "set_metrics.json").read_text())


def test_a_copy_in_a_set_is_named_with_its_original_and_the_report_says_so(workflow, cohort, planted):
    found = measure(workflow, cohort, planted, **{"limits#template_copy": 0.95})
    assert found["cases"] == {"synthetic": 2, "training": 2, "held_out": 2}
    assert [row["case"] for row in found["near_duplicates"]] == ["copy"]
    assert found["near_duplicates"][0]["reason"].startswith("local_correlation with subject_000: ")
    copy, mirrored = found["per_case"]
    assert copy["most_similar"].endswith("subject_000.nii.gz")
    assert mirrored["local_correlation"] < 0.7 < 0.9 < copy["local_correlation"]
    assert copy["distance_ratio"] < 0.6
    assert found["frechet_distance"]["synthetic_training"] is None
    assert "cases in each set, got 2 and 2" in found["frechet_distance"]["refused"]
    assert np.isfinite(found["kernel_distance"]["synthetic_training"]["value"])
    assert found["settings"]["classifier_steps"] == 2
    for pair in ("synthetic_training", "held_out_training"):
        realism = found["realism"][pair]
        assert 0 <= realism["two_sample_auc"]["mean"] <= 1
        assert len(realism["spectrum_ratio"]) == 5
        assert 0.8 < realism["edge_speckle_ratio"] < 1.25
        assert all(0.3 < ratio < 3 for ratio in realism["spectrum_ratio"])
    assert 0 < found["ms_ssim"]["synthetic"]["mean"] < 1
    assert all(": " in row["feature"] or row["feature"] == "grain" for row in found["largest_shifts"])
    assert {group: len(cases) for group, cases in found["traits"].items()} == found["cases"]
    assert all(case["volume_ml"]["aorta"] > 1 for cases in found["traits"].values() for case in cases)
    page = (planted / "report.html").read_text()
    assert "Mean attenuation of every label" in page
    assert "<h2>Near duplicates</h2>" in page
    assert found["near_duplicates"][0]["reason"] in page


def embed(image, label):
    """What a user would put there."""
    return np.array([image[label > 0].mean(), image[label > 0].std()])


def test_a_users_features_are_named_in_the_config(workflow, cohort, planted):
    features = {"_target_": f"{embed.__module__}.embed", "_mode_": "callable"}
    found = measure(workflow, cohort, planted, features=features, feature_names=None, measuring=["@measures"])
    assert {row["feature"] for row in found["largest_shifts"]} == {"feature 0", "feature 1"}


def test_sets_that_cannot_be_measured_are_refused_by_name(workflow, cohort, planted):
    with fails_with("held_out: at least two cases are needed to measure a set, got 1; list more"):
        measure(workflow, cohort, planted, held_out_sections="validation")
    with fails_with("limits: ['ncc'] do not exist; the limits are ['local_correlation', 'template_copy']"):
        measure(workflow, cohort, planted, limits={"ncc": 0.5})


def test_a_set_that_its_report_would_refuse_is_not_measured(workflow, cohort, planted):
    made, label = json.loads((planted / "datalist.json").read_text()), template_of(cohort, "subject_000")["label"]
    made["provenance"]["templates"] = {label: "of what it was"}
    (planted / "datalist.json").write_text(json.dumps(made))
    with fails_with(f"{label}: this template has changed since the set was made from it; bring back what it was"):
        measure(workflow, cohort, planted)
    assert not (planted / "set_metrics.json").exists()


class Arrays:
    """Cases as arrays in files; every volume is its own view."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "records").mkdir()

    def case(self, name, volume):
        path = self.folder / f"{name}.npy"
        np.save(path, volume)
        return {"image": str(path), "label": str(path)}

    def synthetic(self, name, volume, template):
        record = {"case": name, "template": template, "measures": {"template_copy": float("nan")}}
        (self.folder / f"records/{name}.json").write_text(json.dumps(record))
        return {**self.case(name, volume), "record": f"records/{name}.json"}

    def measure(self, synthetic, training, held_out, **changes):
        settings = {
            "read": read_array,
            "features": lambda image, label: np.array([image.mean(), image.std(), image.max() - image.min()]),
            "feature_names": None,
            "num_labels": 3,
            "homogeneous_labels": [1],
            "classifier_steps": 1,
            "limits": {"local_correlation": 0.8, "template_copy": 0.8},
            "max_pairs": 2,
            "candidates": 1,
            "seed": 0,
            "traits": lambda image, label, spacing_mm: {"spacing_mm": list(spacing_mm)},
            "settings": {"spacing_mm": [1.0, 1.0, 1.0]},
        } | changes
        path = measure_set(str(self.folder), synthetic=synthetic, training=training, held_out=held_out, **settings)
        return json.loads(open(path).read())


def read_array(case):
    volume = np.load(case["image"])[None]
    label = np.ones_like(volume)
    label[:, 32:] = 2
    return {"image": MetaTensor(1000 * volume), "label": label, "view": volume, "inside": np.ones_like(volume)}


@pytest.fixture
def arrays(tmp_path):
    made = Arrays(tmp_path)
    real = [made.case(f"real_{seed}", smooth_volume(seed)) for seed in range(5)]
    return made, real[:3], real[3:]


def test_a_template_outside_the_training_cases_is_searched_for_copies_too(arrays):
    made, training, held_out = arrays
    template = made.case("template", smooth_volume(10))
    copy = made.synthetic("copy", np.clip(0.7 * smooth_volume(10) + 0.2, 0, 1), template)
    new = made.synthetic("new", smooth_volume(11), training[0])
    found = made.measure([copy, new], training, held_out)
    assert found["cases"]["training"] == 4
    assert [row["case"] for row in found["near_duplicates"]] == ["copy"]
    assert "local_correlation with template.npy: 1.00, at most 0.8" in found["near_duplicates"][0]["reason"]


def test_copies_are_found_among_the_most_similar_cases_whatever_the_template(arrays):
    made, training, held_out = arrays
    cases = [made.synthetic(f"copy_{k}", smooth_volume(k), training[0]) for k in range(3)]
    found = made.measure(cases, training, held_out)
    assert [row["most_similar"] for row in found["per_case"]] == [case["image"] for case in training]
    assert found["memorisation"]["distance_ratio"]["p50"] == pytest.approx(0, abs=1e-6)
    assert found["local_correlation"]["held_out"]["p95"] < 0.2
    assert found["ms_ssim"]["training"]["pairs"] == 2
    assert found["ms_ssim"]["training"]["of"] == 3


def test_realism_compares_a_set_with_training_cases_and_these_with_held_out_ones(arrays):
    made, training, held_out = arrays
    copies = [made.synthetic(f"copy_{k}", smooth_volume(k), training[0]) for k in range(3)]
    found = made.measure(copies, training, held_out)["realism"]
    assert found.keys() == {"synthetic_training", "held_out_training"}
    same, other = found["synthetic_training"], found["held_out_training"]
    assert same["edge_speckle_ratio"] == pytest.approx(1, abs=1e-6)
    assert same["spectrum_ratio"] == pytest.approx([1] * 5, abs=1e-6)
    assert other["edge_speckle_ratio"] != pytest.approx(1, abs=1e-6)
    rng = np.random.default_rng(0)
    noisy = [
        made.synthetic(f"noisy_{k}", smooth_volume(k) + rng.normal(0, 0.05, (64,) * 3), training[0]) for k in range(3)
    ]
    spoilt = made.measure(noisy, training, held_out)["realism"]
    assert spoilt["synthetic_training"]["edge_speckle_ratio"] > 3
    assert spoilt["synthetic_training"]["spectrum_ratio"][-1] > 2
    assert spoilt["held_out_training"] == other


def test_features_of_users_are_used_and_checked(arrays):
    made, training, held_out = arrays
    cases = [made.synthetic(f"new_{k}", smooth_volume(20 + k), training[0]) for k in range(2)]
    names = ["mean", "sd", "range"]
    first, again = (made.measure(cases, training, held_out, feature_names=names) for _ in range(2))
    assert first == again
    assert {row["feature"] for row in first["largest_shifts"]} <= set(names)
    with pytest.raises(ValueError, match="feature_names: one for each of the 3 features is needed, got 1"):
        made.measure(cases, training, held_out, feature_names=["mean"])
    lengths = iter(range(2, 20))
    with pytest.raises(ValueError, match=r"features: all cases must give equally many, got 2, and 3 of .*new_1.npy"):
        made.measure(cases, training, held_out, features=lambda image, label: np.ones(next(lengths)))


def test_missing_files_are_named(arrays):
    made, training, held_out = arrays
    lost = {"image": "lost.nii.gz", "label": "lost.nii.gz"}
    cases = [made.synthetic(f"new_{k}", smooth_volume(20 + k), template) for k, template in enumerate((lost, lost))]
    with pytest.raises(FileNotFoundError, match="lost.nii.gz"):
        made.measure(cases, training, held_out)
