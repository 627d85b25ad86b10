"""Ask a running MONAI Label server, over HTTP, for all that `ci/monailabel.sh` promises; stop at the first thing amiss.

python ci/monailabel_check.py URL PHANTOMS MODEL_PT METADATA_JSON SERVER_LOG
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
import torch

MODEL = "structdiff_seg_cal"
SEGMENTED, LABELLED = "subject_003", "subject_000"
"""Phantoms: the one that is segmented on every grid, and another, whose own label trains."""
TRAINING_TIMEOUT_S = 3600
LOG_TIMEOUT_S = 20
logger = logging.getLogger("monailabel_check")
Volume = tuple[np.ndarray, np.ndarray]


class CheckError(RuntimeError):
    """Something that was promised is not so."""


def demand(condition: bool, message: str) -> None:
    """Stop unless it is so."""
    if not condition:
        raise CheckError(message)


def call(method: str, url: str, **options: Any) -> requests.Response:
    """One HTTP call whose failure says what the server answered."""
    response = requests.request(method, url, timeout=600, **options)
    demand(response.ok, f"{method} {url}: HTTP {response.status_code}: {response.text[-2000:]}")
    return response


def upload(method: str, url: str, field: str, path: Path, **params: str) -> dict[str, Any]:
    """Send a file, get JSON."""
    with path.open("rb") as file:
        return call(method, url, params=params, files={field: (path.name, file)}).json()


def as_lps(data: np.ndarray, affine: np.ndarray) -> Volume:
    """The same volume with its first two axes reversed."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = data.shape[0] - 1, data.shape[1] - 1
    return data[::-1, ::-1], affine @ flip


def as_oblique(data: np.ndarray, affine: np.ndarray) -> Volume:
    """The same voxels in a frame turned by 20 degrees about two axes."""
    c, s = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    about_z = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    about_x = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
    return data, about_x @ about_z @ affine


def as_anisotropic(data: np.ndarray, affine: np.ndarray) -> Volume:
    """Every second slice."""
    return data[:, :, ::2], affine @ np.diag([1.0, 1.0, 2.0, 1.0])


GRIDS: dict[str, Callable[[np.ndarray, np.ndarray], Volume]] = {
    "ras": lambda data, affine: (data, affine),
    "lps": as_lps,
    "oblique": as_oblique,
    "anisotropic": as_anisotropic,
}
# A reversed grid shows the network the same voxels, a turned one nearly (rounding may cost the last plane), half of the
# slices do not. A label put on the wrong way agrees far less with the right one.
LEAST_AGREEMENT = {"ras": 0.999, "lps": 0.999, "oblique": 0.9, "anisotropic": 0.6}


def read(path: Path) -> Volume:
    """Voxels and affine of a NIfTI file."""
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Dice of all labels together, over voxels that carry the same label in both."""
    return 2 * float(np.sum((first == second) & (first > 0))) / float(np.sum(first > 0) + np.sum(second > 0))


def plugin_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the plugin of 3D Slicer sends for the options that the server advertises: all of them, of a list the first.

    As `getParamsFromConfig` in `MONAILabel.py` of MONAI Label 0.8.5.
    """
    return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}


def check_info(url: str, metadata: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The server has the model and its trainer, and our label names (in small letters) with our ids.

    Returns:
        what the plugin of 3D Slicer sends to segment and to train.
    """
    names = json.loads(metadata.read_text())["network_data_format"]["outputs"]["pred"]["channel_def"]
    expected = {name.lower(): int(i) for i, name in names.items() if name != "background"}
    info = call("GET", f"{url}/info/").json()
    for part in ("models", "trainers"):
        demand(
            MODEL in info[part], f"/info/: {MODEL} is not among the {part} {sorted(info[part])}; see the server's log"
        )
    labels = info["models"][MODEL]["labels"]
    demand(list(labels.items()) == list(expected.items()), f"/info/: labels {labels}, expected {expected}")
    logger.info("/info/ names the labels: %s", labels)
    return plugin_defaults(info["models"][MODEL]["config"]), plugin_defaults(info["trainers"][MODEL]["config"])


def infer(url: str, name: str, folder: Path, options: dict[str, Any]) -> Volume:
    """Segment a study and return the label that the server sends back."""
    form = {"params": json.dumps({**options, "result_dtype": "uint8"})}
    answer = call("POST", f"{url}/infer/{MODEL}", params={"image": name, "output": "image"}, data=form)
    path = folder / f"{name}_label.nii.gz"
    path.write_bytes(answer.content)
    return read(path)


def check_inference(url: str, phantoms: Path, folder: Path, options: dict[str, Any]) -> None:
    """The label of every grid lies on the grid of its image, and says the same about the same anatomy."""
    (data, affine), (true_label, _) = (read(phantoms / kind / f"{SEGMENTED}.nii.gz") for kind in ("images", "labels"))
    reference = None
    for name, change in GRIDS.items():
        voxels, grid = change(data, affine)
        path = folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.ascontiguousarray(voxels), grid), path)
        upload("PUT", f"{url}/datastore/image", "file", path, image=name)
        label, label_grid = infer(url, name, folder, options)
        demand(label.shape == voxels.shape, f"{name}: label of shape {label.shape}, image of {voxels.shape}")
        off = float(np.abs(label_grid - grid).max())
        demand(off < 1e-3, f"{name}: the label's affine is off by {off:g} mm:\n{label_grid}\nimage:\n{grid}")
        demand(bool((label > 0).any()), f"{name}: the label is empty; use weights that find something")
        reference = label if reference is None else reference
        agreement = dice(label, change(reference, affine)[0])
        logger.info(
            "%s: on the image's grid; Dice to the RAS label %.3f, to the true one %.3f",
            *(name, agreement, dice(label, change(true_label, affine)[0])),
        )
        demand(
            agreement >= LEAST_AGREEMENT[name], f"{name}: agrees with the RAS label by a Dice of {agreement:.3f} only"
        )


def spoiled(data: np.ndarray) -> dict[str, tuple[np.ndarray, str]]:
    """Images that training refuses, with the rule that the server's log must name."""
    values = data.astype(np.float32)
    one_nan = values.copy()
    one_nan[30, 30, 30] = np.nan
    return {
        "one_nan": (one_nan, "holds NaN or infinite voxels"),
        "unsigned": ((values + 1024).clip(0).astype(np.uint16), "are not Hounsfield units"),
        "two_phases": (np.stack([values, values], -1), "must be one 3D volume"),
    }


def is_said(log: Path, *texts: str) -> bool:
    """Whether a line of the server's log holds all texts; it is written after the answer is sent."""
    end = time.monotonic() + LOG_TIMEOUT_S
    while not (found := any(all(text in line for text in texts) for line in log.read_text().splitlines())):
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    return found


def check_refusals(url: str, phantoms: Path, folder: Path, log: Path, options: dict[str, Any]) -> None:
    """What training refuses is not segmented, and the server's log says which file and why; then it goes on."""
    data, affine = read(phantoms / "images" / f"{SEGMENTED}.nii.gz")
    for name, (values, rule) in spoiled(data).items():
        path = folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(values, affine), path)
        upload("PUT", f"{url}/datastore/image", "file", path, image=name)
        form = {"params": json.dumps(options)}
        answer = requests.post(f"{url}/infer/{MODEL}", params={"image": name}, data=form, timeout=600)
        demand(answer.status_code == 500, f"{name}: was segmented, HTTP {answer.status_code}")
        demand(is_said(log, f"{name}.nii.gz: ", rule), f"{name}: {log} does not name the file with: {rule}")
        logger.info("%s: refused, %s", name, rule)
        call("DELETE", f"{url}/datastore/image", params={"id": name})


def check_label(url: str, phantoms: Path) -> None:
    """The label of another scan than the segmented one is taken, given back unchanged, and listed for training."""
    image, truth = (phantoms / kind / f"{LABELLED}.nii.gz" for kind in ("images", "labels"))
    upload("PUT", f"{url}/datastore/image", "file", image, image=LABELLED)
    upload("PUT", f"{url}/datastore/label", "label", truth, image=LABELLED, tag="final")
    answer = call("GET", f"{url}/datastore/label", params={"label": LABELLED, "tag": "final"})
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
        Path(file.name).write_bytes(answer.content)
        demand(np.array_equal(read(Path(file.name))[0], read(truth)[0]), "the label came back changed")
    listed = call("GET", f"{url}/datastore/", params={"output": "train"}).json()
    demand(len(listed) == 1, f"/datastore/: one case is labelled, listed for training are {listed}")
    logger.info("the label of another scan is stored: %s", listed[0]["label"])


def check_training(url: str, model: Path, options: dict[str, Any]) -> None:
    """One epoch from that label changes the weights and ends well, when asked for as the plugin of 3D Slicer asks."""
    before = torch.load(model, weights_only=True)
    logger.info("training is asked for with %s", options)
    call("POST", f"{url}/train/{MODEL}", json={**options, "max_epochs": 1})
    end = time.monotonic() + TRAINING_TIMEOUT_S
    while (task := call("GET", f"{url}/train/").json())["status"] in ("SUBMITTED", "RUNNING"):
        demand(time.monotonic() < end, f"training did not end within {TRAINING_TIMEOUT_S} s: {task}")
        time.sleep(2)
    demand(task["status"] == "DONE", f"training ended as {task['status']}:\n" + "\n".join(task["details"]))
    after = torch.load(model, weights_only=True)
    demand(before.keys() == after.keys(), f"{model}: training changed the names of the weights")
    changed = sum(not torch.equal(value, after[key]) for key, value in before.items())
    demand(changed > 0, f"{model}: training left every weight as it was")
    demand(all(bool(torch.isfinite(value).all()) for value in after.values()), f"{model}: weights are not finite")
    logger.info("one epoch changed %d of %d weight tensors", changed, len(after))


def main(url: str, phantoms: str, model: str, metadata: str, log: str) -> None:
    """All checks, in the order of an annotation session."""
    cases = Path(phantoms)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        to_segment, to_train = check_info(url, Path(metadata))
        check_inference(url, cases, folder, to_segment)
        check_refusals(url, cases, folder, Path(log), to_segment)
        check_label(url, cases)
        check_training(url, Path(model), to_train)
        infer(url, "ras", folder, to_segment)
    logger.info("the server segments with the new weights; all checks passed")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main(*sys.argv[1:])
    except (CheckError, requests.RequestException) as error:
        sys.exit(f"monailabel_check: {error}")
