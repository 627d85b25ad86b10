"""The segmentation bundle keeps what MONAI Label 0.8.5 asks of a bundle; `ci/monailabel.sh` asks MONAI Label itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import monai.bundle
import numpy as np
import pytest
import torch
from custom.volumes import LabelsOnFileGridd
from custom.volumes.anatomy import Anatomy
from helpers import BAD_IMAGES, ROOT, write_bad_image, write_oriented
from monai.bundle import ConfigParser
from monai.data import MetaTensor, partition_dataset
from monai.transforms import LoadImaged

SOURCE = ROOT / "bundles/structdiff_seg_cal/configs"
TINY = {
    "network_def#init_filters": 4,
    "network_def#blocks_down": [1, 1],
    "network_def#blocks_up": [1],
    "spacing_mm": [4.0, 4.0, 4.0],
    "roi_size": [16, 16, 16],
    "roi_margin": 4,
    "samples_per_epoch": 2,
}
VESSEL_HU = 200
IMAGE = "images/subject_003.nii.gz"


def write_config(bundle: Path, name: str, changes: dict[str, Any]) -> None:
    """Change values of a config of the copied bundle in place: MONAI Label's own overrides stay what they are."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / name)
    parser.update({key: value for key, value in changes.items() if key in parser})
    ConfigParser.export_config_file(parser.config, str(bundle / "configs" / name), indent=1)


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A tiny copy of the bundle where the monaibundle app has it; logging to MLflow is left out."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "path", [*sys.path])
    root = tmp_path / "model/structdiff_seg_cal"
    shutil.copytree(SOURCE, root / "configs")
    for name in ("train.json", "inference.json"):
        write_config(root, name, TINY)
    for section in ("train", "validate"):
        handlers = ConfigParser.load_config_file(root / "configs/train.json")[section]["handlers"]
        write_config(root, "train.json", {f"{section}#handlers": [h for h in handlers if "MLFlow" not in str(h)]})
    return root


def labelled(cohort: Path, count: int) -> list[dict[str, str]]:
    """What MONAI Label's datastore lists: files of image and label, nothing else."""
    return [
        {part: str(cohort / f"{part}s/subject_{i:03d}.nii.gz") for part in ("image", "label")} for i in range(count)
    ]


def overrides_of_request(bundle: Path, cases: list[dict[str, str]], max_epochs: int) -> dict[str, Any]:
    """What a training request changes in `train.json`."""
    handlers = ConfigParser.load_config_file(bundle / "configs/train.json")["train"]["handlers"]
    model = bundle / "models/model.pt"
    if model.exists():
        load_dict = {"model": "$@network"}
        loader = {"_target_": "CheckpointLoader", "load_path": str(model), "load_dict": load_dict, "strict": False}
        handlers.insert(0, loader)
    training, validation = partition_dataset(cases, ratios=[0.8, 0.2], shuffle=False)
    return {
        "bundle_root": str(bundle),
        "train#trainer#max_epochs": max_epochs,
        "train#dataset#data": training,
        "device": "cpu",
        "train#handlers": handlers,
        "validate#dataset#data": validation,
    }


def request_training(
    bundle: Path, cases: list[dict[str, str]], max_epochs: int, run_id: str = "run", **options: str
) -> dict[str, torch.Tensor]:
    """Run the bundle as a training request does and return the weights it leaves; options are those of tracking."""
    monai.bundle.run(
        run_id=run_id,
        init_id=None,
        final_id=None,
        meta_file=str(bundle / "configs/metadata.json"),
        config_file=str(bundle / "configs/train.json"),
        **overrides_of_request(bundle, cases, max_epochs),
        **options,
    )
    return torch.load(bundle / "models/model.pt", weights_only=True)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def weights_of_zeros(bundle: Path) -> dict[str, torch.Tensor]:
    network = ConfigParser(ConfigParser.load_config_file(bundle / "configs/inference.json")["network_def"])
    network["out_channels"] = 11
    return {key: torch.zeros_like(value) for key, value in network.get_parsed_content("").state_dict().items()}


def test_metadata_names_the_labels_in_the_order_of_their_ids():
    """3D Slicer numbers the labels by this order."""
    metadata = json.loads((SOURCE / "metadata.json").read_text())["network_data_format"]
    names = metadata["outputs"]["pred"]["channel_def"]
    assert list(metadata["inputs"]) == ["image"]
    assert list(names) == [str(i) for i in range(len(names))]
    assert list(names.values()) == Anatomy(json.loads((SOURCE / "train.json").read_text())["anatomy"]).names


def test_inference_has_the_blocks_that_are_read_and_names_of_ours_only_volumes_in_them():
    """The server puts the bundle's folder on the path while it builds these blocks; of `custom` they need one room."""
    config = json.loads((SOURCE / "inference.json").read_text())
    assert {"bundle_root", "device", "network_def", "preprocessing", "inferer", "postprocessing"} <= config.keys()
    parts = ("network_def", "hide_path", "read", "show_path", "scale", "preprocessing", "inferer", "postprocessing")
    ours = re.findall(r"custom\.(\w+)", json.dumps([config[part] for part in parts]))
    assert set(ours) == {"volumes"}
    assert config["run"][0] == "@versions"


def test_what_the_server_does_not_drop_writes_no_file():
    """It leaves out `SaveImaged` and writes the result itself; our own writing is not among the blocks it takes."""
    config = json.loads((SOURCE / "inference.json").read_text())
    assert "Save" not in json.dumps(config["postprocessing"])
    assert config["evaluator"]["postprocessing"] == "$monai.transforms.Compose([@postprocessing, @save])"


def test_handlers_are_dictionaries_and_leave_the_loading_of_weights_to_the_server():
    handlers = json.loads((SOURCE / "train.json").read_text())["train"]["handlers"]
    assert all(isinstance(handler, dict) for handler in handlers)
    assert "CheckpointLoader" not in [handler["_target_"] for handler in handlers]


def test_one_corrected_label_trains(bundle, cohort):
    weights = request_training(bundle, labelled(cohort, 1), max_epochs=2)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not (bundle / "eval/metrics.csv").exists(), "there is no case to validate with"


@pytest.mark.parametrize("count", [1, 4], ids=["last", "best"])
def test_request_of_3d_slicer_trains_once(bundle, cohort, count):
    """The plugin sends back the empty run id that the server advertises; MONAI then evaluates the whole config."""
    weights = request_training(bundle, labelled(cohort, count), max_epochs=2, run_id="")
    assert all(torch.isfinite(value).all() for value in weights.values())
    table = bundle / "eval/metrics.csv"
    assert len(table.read_text().splitlines()) == 2 if count > 1 else not table.exists()
    write_config(bundle, "train.json", {"learning_rate": 0.0})
    assert equal(weights, request_training(bundle, labelled(cohort, count), max_epochs=1, run_id=""))


def test_config_is_evaluated_without_a_list_of_cases_and_does_nothing_until_it_is_run(bundle, cohort):
    """All but what is run; MONAI Label itself evaluates no more than it needs when the run id is not empty."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs/train.json")
    parser.read_meta(bundle / "configs/metadata.json")
    parser.update(overrides_of_request(bundle, labelled(cohort, 2), max_epochs=1))
    before = sorted(bundle.rglob("*"))
    for name in parser.config.keys() - {"_meta_", "initialize", "training", "run"}:
        parser.get_parsed_content(name)
    assert parser.get_parsed_content("train#trainer").state.iteration == 0
    assert sorted(bundle.rglob("*")) == before


def test_second_request_goes_on_from_the_weights_of_the_first(bundle, cohort):
    first = request_training(bundle, labelled(cohort, 1), max_epochs=1)
    second = request_training(bundle, labelled(cohort, 2), max_epochs=1)
    assert not equal(first, second), "the second request trained nothing"
    write_config(bundle, "train.json", {"learning_rate": 0.0})
    assert equal(second, request_training(bundle, labelled(cohort, 2), max_epochs=1))


def test_chosen_weights_win_over_pretrained_ones(bundle, cohort):
    zeros = weights_of_zeros(bundle)
    (bundle / "models").mkdir()
    torch.save(zeros, bundle / "models/pretrained.pt")
    write_config(bundle, "train.json", {"learning_rate": 0.0})
    assert equal(zeros, request_training(bundle, labelled(cohort, 1), max_epochs=1)), "pre-trained weights unused"
    chosen = {key: value + 0.1 for key, value in zeros.items()}
    torch.save(chosen, bundle / "models/model.pt")
    assert equal(chosen, request_training(bundle, labelled(cohort, 1), max_epochs=1))


def test_few_epochs_with_validation_still_leave_weights(bundle, cohort):
    """Weights are written by the validation, whose interval may be longer than the request."""
    request_training(bundle, labelled(cohort, 4), max_epochs=1)
    assert len((bundle / "eval/metrics.csv").read_text().splitlines()) == 2


class Threshold(torch.nn.Module):
    """Says "pulmonary veins" (id 10, of which every piece is kept) wherever the scaled image is above a threshold."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 11, *image.shape[2:])
        logits[:, 10:11] = 200 * (image.as_subclass(torch.Tensor) - (VESSEL_HU + 200) / 1000)
        return logits


def infer_as_monai_label(bundle: Path, image: Path, network: torch.nn.Module) -> dict[str, Any]:
    """Preprocess, infer and postprocess one request, as a server with `--conf sam2 false` does on a CPU."""
    parser = ConfigParser(ConfigParser.load_config_file(bundle / "configs/inference.json"))
    parser.update({"bundle_root": str(bundle), "device": "cpu"})
    steps = {key: list(parser.get_parsed_content(key).transforms) for key in ("preprocessing", "postprocessing")}
    for step in steps["preprocessing"]:
        if isinstance(step, LoadImaged):
            step._loader.image_only = False
    request = {"model": "structdiff_seg_cal", "model_filename": ["model.pt"], "device": "cpu", "description": "x"}
    item: dict[str, Any] = {**request, "image": str(image), "image_path": str(image), "save_label": False}
    for step in steps["preprocessing"]:
        item = step(item)
    with torch.no_grad():
        item["pred"] = parser.get_parsed_content("inferer")(item["image"][None], network)[0]
    assert sum(isinstance(step, LabelsOnFileGridd) for step in steps["postprocessing"]) == 1
    for step in steps["postprocessing"]:
        item = step(item)
    return item


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "oblique", "anisotropic"])
def test_label_lies_on_the_grid_of_the_image(bundle, cohort, tmp_path, orientation):
    path = tmp_path / "image.nii.gz"
    image, affine = write_oriented(cohort / IMAGE, path, orientation)
    item = infer_as_monai_label(bundle, path, Threshold())
    pred = item["pred"]
    assert isinstance(pred, MetaTensor)
    assert tuple(pred.shape) == (1, *image.shape), "the server would resample a label of another size"
    np.testing.assert_allclose(pred.affine, affine, atol=1e-3)
    np.testing.assert_allclose(item["image"].meta["original_affine"], affine, atol=1e-3)  # what the server writes
    assert item["image_path"] == str(path), "the server names its result by it"
    label = pred.numpy()[0]
    assert set(np.unique(label)) == {0, 10}
    truth = image > VESSEL_HU
    dice = 2 * np.sum(truth & (label == 10)) / (truth.sum() + (label == 10).sum())
    flipped = np.sum(truth & (label[::-1, ::-1] == 10)) / truth.sum()
    assert dice > 0.7, dice
    assert flipped < 0.6, f"a flipped label must be told apart, {flipped}"


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image_that_training_refuses_is_refused_in_the_server_too(bundle, cohort, tmp_path, name):
    bad = write_bad_image(name, cohort, tmp_path / f"{name}.nii.gz")
    with pytest.raises(ValueError, match=re.escape(f"{bad}: ")) as caught:
        infer_as_monai_label(bundle, Path(bad), Threshold())
    assert all(text in str(caught.value) for text in BAD_IMAGES[name])


class Diverged(torch.nn.Module):
    """What weights of NaN predict."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.full((len(image), 11, *image.shape[2:]), torch.nan)


def test_prediction_that_is_not_finite_is_refused_in_the_server_too(bundle, cohort, tmp_path):
    path = tmp_path / "image.nii.gz"
    shutil.copy(cohort / IMAGE, path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the result is NaN or infinite in ")):
        infer_as_monai_label(bundle, path, Diverged())


def test_weights_of_a_request_fit_the_network_of_inference(bundle, cohort):
    weights = request_training(bundle, labelled(cohort, 1), max_epochs=1)
    network = ConfigParser(ConfigParser.load_config_file(bundle / "configs/inference.json")).get_parsed_content(
        "network_def"
    )
    network.load_state_dict(weights)


@pytest.mark.slow
def test_tracking_can_be_switched_on_in_a_request(bundle, cohort, tmp_path):
    """MONAI then adds handlers of its own, which expect decollated output."""
    uri = f"sqlite:///{tmp_path}/tracking.db"
    request_training(
        bundle, labelled(cohort, 3), max_epochs=1, tracking="mlflow", tracking_uri=uri, experiment_name="annotation"
    )
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("annotation").experiment_id])
    assert any("train_loss" in run.data.metrics for run in runs)


@pytest.mark.slow
def test_two_processes_train_a_request_together(bundle, cohort):
    """With several GPUs the server writes its overrides into a config and starts torchrun on it."""
    config_file, model = bundle / "configs/monailabel_train.json", bundle / "models/model.pt"
    first = request_training(bundle, labelled(cohort, 1), max_epochs=1)
    parser = ConfigParser()
    parser.read_config(bundle / "configs/train.json")
    parser.update(overrides_of_request(bundle, labelled(cohort, 4), max_epochs=1))
    ConfigParser.export_config_file(parser.config, str(config_file), indent=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "run", "--meta_file", str(bundle / "configs/metadata.json")]
    command += ["--config_file", f"['{config_file}','{bundle / 'configs/multi_gpu_train.json'}']"]
    command += ["--logging_file", str(bundle / "configs/logging.conf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not equal(first, torch.load(model, weights_only=True)), "the processes trained nothing"
