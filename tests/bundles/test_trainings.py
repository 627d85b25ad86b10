"""Trainings of both bundles as users start them: without validation, diverging, continued, two at once, tracked."""

from __future__ import annotations

import json
import shutil
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.runs import TrainingPlace
from helpers import BUNDLE, SEG_BUNDLE, TINY_TRAINING, fails_with, other_process, workflow_of
from ignite.engine import Events
from monai.transforms import Compose

TINY = {
    BUNDLE: TINY_TRAINING,
    SEG_BUNDLE: {
        "spacing_mm": [4.0, 4.0, 4.0],
        "roi_size": [16, 16, 16],
        "roi_margin": 8,
        "network_def#blocks_down": [1, 1],
        "network_def#blocks_up": [1],
        "samples_per_epoch": 4,
        "max_epochs": 2,
        "val_interval": 1,
    },
}
bundles = pytest.mark.parametrize("bundle", TINY, ids=lambda bundle: bundle.name)


def training(bundle, data, folder, **options):
    places = {"dataset_dir": str(data), "output_dir": str(folder / "out"), "ckpt_dir": str(folder / "models")}
    return workflow_of(bundle)("train.json", **{**places, **TINY[bundle], **options})


def weights_in(folder):
    return torch.load(folder / "models/model.pt", weights_only=True)


@pytest.fixture
def one_case(cohort, tmp_path):
    """A list of one case, with nothing to validate on."""
    files = {key: str(cohort / f"{key}s/subject_000.nii.gz") for key in ("image", "label")}
    folder = tmp_path / "one_case"
    folder.mkdir()
    (folder / "datalist.json").write_text(json.dumps({"training": [files]}))
    return folder


@bundles
@pytest.mark.parametrize("switch", [{"val_interval": 0}, {"validate#dataset#data": []}], ids=["option", "list"])
def test_one_case_trains_without_validation_and_leaves_its_last_weights(bundle, one_case, tmp_path, capsys, switch):
    run = training(bundle, one_case, tmp_path, max_epochs=1, samples_per_epoch=2, **switch)
    run.run()
    parser = run.parser
    network = (
        parser.get_parsed_content("ema").ema_model if bundle == BUNDLE else parser.get_parsed_content("network_def")
    )
    last = network.state_dict()
    assert all(torch.equal(last[key].cpu(), value) for key, value in weights_in(tmp_path).items())
    assert "the last weights are kept" in capsys.readouterr().out
    assert not (tmp_path / "out/metrics.csv").exists()


@bundles
def test_a_list_without_validation_cases_is_refused_with_the_switch(bundle, one_case, tmp_path):
    with fails_with("no case in section 'validation'; check the section names, or set `val_interval` 0 to train"):
        training(bundle, one_case, tmp_path).run()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "models").exists()


@bundles
def test_a_training_that_diverges_is_an_error_and_spares_the_weights_there_are(bundle, cohort, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.pt").write_bytes(b"good ones")
    with fails_with("learning_rate 1e+30: the training diverged"):
        training(bundle, cohort, tmp_path, learning_rate=1e30, max_epochs=4).run()
    assert (tmp_path / "models/model.pt").read_bytes() == b"good ones"


@pytest.fixture(scope="module")
def interrupted(cohort, tmp_path_factory):
    """Folders of trainings that were killed in their second epoch."""

    def kill(engine):
        raise KeyboardInterrupt

    folders = {}
    for bundle in TINY:
        folders[bundle] = tmp_path_factory.mktemp("interrupted")
        broken = training(bundle, cohort, folders[bundle])
        broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), kill)
        with pytest.raises(KeyboardInterrupt):
            broken.run()
    return folders


CHANGES = {
    "seed": (5, "seed 0, now 5"),
    "batch_size": (1, "batch_size "),
    "samples_per_epoch": (6, "samples_per_epoch 4, now 6"),
    "roi_margin": (4, "roi_margin 8, now 4"),
    "roi_size": ([8, 8, 16], "roi_size ["),
    "amp": (True, "amp False, now True"),
    "label_mapping": ({"from": [11], "to": [0]}, "label_mapping#from [11, 12, 13, 14], now [11]"),
    "val_interval": (2, "val_interval 1, now 2"),
}
OWN_CHANGES = {
    BUNDLE: {
        "sampling_steps": (3, "sampling_steps 2, now 3"),
        "thin_weight": (2.0, "thin_weight 10.0, now 2.0"),
        "edge_weight": (1.0, "edge_weight 4.0, now 1.0"),
        "clip_norm": (5.0, "clip_norm 1.0, now 5.0"),
        "warmup_epochs": (0, "warmup_epochs 2, now 0"),
        "moments_epochs": (0, "moments_epochs 1, now 0"),
        "sample_strength": (1.0, "sample_strength 0.0, now 1.0"),
        "grain": (0.0, "grain 1.0, now 0.0"),
        "anatomy#9#nominal_hu": (300, "anatomy#9#nominal_hu 330, now 300"),
    },
    SEG_BUNDLE: {
        "intensity_hu": ([-100, 800], "intensity_hu [-200, 800], now [-100, 800]"),
        "anatomy#9#class_weight": (2, "anatomy#9#class_weight 6, now 2"),
    },
}
UNUSED = {BUNDLE: {"anatomy#9#class_weight": 2}, SEG_BUNDLE: {"anatomy#9#nominal_hu": 300}}


@pytest.mark.parametrize(
    ("bundle", "option"),
    [(bundle, option) for bundle in TINY for option in (*CHANGES, *OWN_CHANGES[bundle])],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_training_is_not_continued_with_another_option(interrupted, cohort, bundle, option):
    value, words = {**CHANGES, **OWN_CHANGES[bundle]}[option]
    folder = interrupted[bundle]
    before = (folder / "out/resume.pt").read_bytes()
    with fails_with(f"{folder}/out/resume.pt: is of an interrupted run with {words}"):
        training(bundle, cohort, folder, **{option: value}).run()
    assert (folder / "out/resume.pt").read_bytes() == before


@bundles
def test_a_training_is_not_continued_with_other_data_of_the_same_names(interrupted, cohort, tmp_path, bundle):
    shutil.copytree(cohort, tmp_path / "data")
    shutil.copy(cohort / "labels/subject_001.nii.gz", tmp_path / "data/labels/subject_000.nii.gz")
    with fails_with("resume.pt: is of an interrupted run with data#training#0 subject_000#label "):
        training(bundle, tmp_path / "data", interrupted[bundle]).run()


@bundles
def test_a_training_may_go_on_with_moved_data_another_log_and_what_it_does_not_use(
    interrupted, cohort, tmp_path, bundle, capsys
):
    shutil.copytree(cohort, tmp_path / "moved")
    options = {"tracking_uri": "sqlite:////nowhere/mlflow.db", **UNUSED[bundle]}
    training(bundle, tmp_path / "moved", interrupted[bundle], **options).run()
    assert "resumed from" in capsys.readouterr().out
    assert (interrupted[bundle] / "models/model.pt").exists()


@pytest.mark.slow
@bundles
@pytest.mark.parametrize(
    ("theirs", "refusal"),
    [
        (("out", "others/model.pt"), "output_dir {0}/out: process {1}"),
        (("other", "models/model.pt"), "{0}/models/model.pt: process {1}"),
    ],
    ids=["folder", "weights"],
)
def test_a_second_training_into_one_place_is_refused_before_it_reads_anything(
    bundle, cohort, tmp_path, theirs, refusal
):
    output_dir, weights = (str(tmp_path / name) for name in theirs)
    with other_process(TrainingPlace(output_dir=output_dir, weights=weights).take) as other:
        run = training(bundle, cohort, tmp_path)
        with fails_with(refusal.format(tmp_path, other)):
            run.run()
        visible = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]
        assert visible == []


@pytest.mark.slow
@bundles
def test_a_server_in_the_environment_redirects_no_training(bundle, cohort, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    begun = time.monotonic()
    training(bundle, cohort, tmp_path, max_epochs=1, mlflow=True).run()
    assert time.monotonic() - begun < 120
    assert (tmp_path / "out/mlflow.db").exists()


def test_cases_of_two_spacings_train_together(cohort, tmp_path):
    cases = []
    for subject, voxel_mm in (("subject_000", 2.5), ("subject_001", 3.0)):
        case = {key: f"{subject}_{key}.nii.gz" for key in ("image", "label")}
        for key, name in case.items():
            source = nib.load(cohort / f"{key}s/{subject}.nii.gz")
            nib.save(nib.Nifti1Image(np.asarray(source.dataobj), np.diag([voxel_mm] * 3 + [1])), tmp_path / name)
        cases.append(case)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": cases, "validation": cases}))
    places = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")}
    options = {**TINY_TRAINING, "max_epochs": 1, "val_cases": 2, "spacing_mm": [2.0, 2.8]}
    run = workflow_of(BUNDLE)("train.json", **options, **places)
    read = Compose(run.parser.get_parsed_content("read"))
    spacings = [read(dict(case))["label"].pixdim[0] for case in run.parser.get_parsed_content("train#data")]
    np.testing.assert_allclose(spacings, [2.5, 2.8], rtol=1e-4)
    run.run()
    state = weights_in(tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert state["regressor.out.2.conv.weight"].any()
