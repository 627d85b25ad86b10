"""What several test files share: places, small options, ways to run and to break a run, volumes made up."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.diffusion.coarse import CoarseUNet
from custom.diffusion.context import Context
from custom.diffusion.network import StructDiffUNet
from custom.geometry.topology import betti_numbers, components_touching
from custom.geometry.vessels import VesselTree, draw
from custom.volumes.anatomy import Anatomy
from monai.bundle import ConfigWorkflow
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]


BUNDLE, SEG_BUNDLE = (ROOT / "bundles" / name for name in ("structdiff_cardiac", "structdiff_seg_cal"))


CONFIGS = BUNDLE / "configs"


TINY = {"network_def#channels": [8, 8], "network_def#condition_channels": 4, "spacing_mm": [3.0, 3.0, 3.0]}


TINY_COARSE = {"coarse_def#channels": [8, 16], "coarse_steps": 2}
"""Of the coarse stage in `inference.json`, beside `TINY`."""


TINY_TRAINING = {
    **TINY,
    "roi_size": [24, 24, 24],
    "roi_margin": 8,
    "samples_per_epoch": 4,
    "pair_uses": 1,
    "batch_size": 2,
    "max_epochs": 2,
    "moments_epochs": 1,
    "val_interval": 1,
    "val_cases": 1,
    "sampling_steps": 2,
}


def network_of_prior(sigma: float = 0.1, channels: tuple[int, ...] = (8, 8)) -> StructDiffUNet:
    """An untrained network of `TINY`: its mean is the prior, its U-Net silent, its deviation `sigma` (100 HU each)."""
    network = StructDiffUNet(num_labels=11, channels=channels, condition_channels=4)
    assert not any(part.out[-1].conv.weight.any() for part in (network.regressor, network.unet))
    with torch.no_grad():
        untrained = network.encode(Context.absent(torch.zeros(1, 1, 8, 8, 8)).stacked()).sigma
        network.regressor.out[-1].conv.bias[8:] += torch.log(sigma / untrained[0, :, 0, 0, 0])
    return network


class SmoothCoarse(CoarseUNet):
    """A coarse stage that draws what it is told, or else -100 HU: what remains to be seen is the work of others."""

    def draw(self, context: torch.Tensor, noise: torch.Tensor, times: Sequence[int]) -> torch.Tensor:
        """The painted mask on a flat background."""
        return 500 * context[:, :1] if context[:, :1].any() else torch.full_like(noise, -100.0)


@contextlib.contextmanager
def other_process(take: Callable[[], Any]) -> Iterator[int]:
    """Another process that has called `take` and waits, with a forked worker that outlives it; its id.

    Forked, not started: it need not import what this process has.
    """
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setpgid(0, 0)
            take()
            if os.fork() > 0:
                os.write(tell, b"taken")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(told, 5) == b"taken"
        yield process
    finally:
        os.close(told)
        os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # the test has waited for it
            os.waitpid(process, 0)


def succeeds_elsewhere(take: Callable[[], Any]) -> bool:
    """Whether another process can call `take`."""
    process = os.fork()
    if process == 0:
        try:
            take()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1] == 0


def workflow_of(bundle: Path) -> Callable[..., ConfigWorkflow]:
    """How to build and initialise a workflow from config names and overrides; logging to MLflow is left out."""

    def build(*names: str, workflow_type: str = "train", mlflow: bool = False, **overrides: Any) -> ConfigWorkflow:
        torch.set_num_threads(1)
        result = ConfigWorkflow(
            config_file=[str(bundle / "configs" / name) for name in names],
            meta_file=str(bundle / "configs/metadata.json"),
            logging_file=str(bundle / "configs/logging.conf"),
            workflow_type=workflow_type,
            bundle_root=str(bundle),
            **overrides,
        )
        if not mlflow:
            for section in ("train", "validate"):
                if section in result.parser.config:
                    handlers = result.parser[section]["handlers"]
                    result.parser[section]["handlers"] = [h for h in handlers if "MLFlow" not in str(h)]
        result.initialize()
        return result

    return build


def run_module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *arguments: str) -> int | str | None:
    """`python -m NAME ARGUMENTS` in a folder, but in this process: a new one takes seconds to import MONAI.

    Its exit code, or the words with which it ends.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(ROOT / name.replace(".", "/") / "__main__.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def template_of(cohort, subject="subject_000"):
    return {"image": str(cohort / f"images/{subject}.nii.gz"), "label": str(cohort / f"labels/{subject}.nii.gz")}


@contextlib.contextmanager
def fails_with(text):
    """MONAI wraps errors in others; the reason stands somewhere in the chain that the user sees."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        yield
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    assert any(text in message for message in chain), chain


def write_oriented(source_path, path, orientation):
    """A volume in another orientation, an oblique frame, or on an anisotropic grid; returns voxels and affine."""
    source = nib.load(source_path)
    data, affine = np.asarray(source.dataobj), source.affine.copy()
    if orientation == "LPS":
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])
        flip[:2, 3] = data.shape[0] - 1, data.shape[1] - 1
        data, affine = data[::-1, ::-1], affine @ flip
    elif orientation == "oblique":
        angle = np.deg2rad(12)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = turn @ affine
    elif orientation == "anisotropic":
        data, affine = data[:, :, ::2], affine @ np.diag([1, 1, 2, 1.0])
    nib.save(nib.Nifti1Image(np.ascontiguousarray(data), affine), path)
    return np.ascontiguousarray(data), affine


def airway():
    """Bronchi that fork in a lung and come from a trachea: another organ. Their tree is one thin label."""
    points = np.array([[22, 22, 36], [22, 22, 27], [12, 19, 14], [33, 25, 14], [8, 22, 7], [37, 21, 7]], float)
    edges = np.array([[0, 1], [1, 2], [1, 3], [2, 4], [3, 5]])
    tree = VesselTree(points, np.array([3.5, 3.0, 2.0, 2.0, 1.5, 1.5]), edges, np.array([0]))
    grid = np.stack(np.meshgrid(*map(np.arange, (44, 44, 48)), indexing="ij"), -1)
    label = np.zeros((44, 44, 48), np.uint8)
    label[(((grid - [22, 22, 17]) / [20, 17, 15]) ** 2).sum(-1) <= 1] = 1
    label[np.abs(grid - [22, 22, 43]).max(-1) <= 3] = 3
    label[draw(tree, label.shape, (1.0, 1.0, 1.0))] = 2
    return label


ORGAN_ROWS = {
    "0": {"name": "background", "nominal_hu": 40},
    "1": {"name": "lung", "nominal_hu": -850, "plausible_hu": [-950, -600], "contrast_sd_hu": 30, "homogeneous": True},
    "2": {"name": "bronchi", "nominal_hu": -500, "thin": True, "touches": [3], "class_weight": 4},
    "3": {"name": "trachea", "nominal_hu": -950, "homogeneous": True, "pieces_kept": 1},
}
ORGAN = Anatomy(ORGAN_ROWS).structures


def assert_kept(new, source, structures):
    for k, structure in structures.items():
        assert betti_numbers(new == k) == betti_numbers(source == k), structure.name
        for other in structure.touches:
            touching, total = components_touching(new == k, new == other)
            assert touching == total > 0


_NAN = ("holds NaN or infinite voxels", "replace them before use")
_NO_HU = ("are not Hounsfield units", "apply the rescale slope and intercept")
BAD_IMAGES = {
    "nan_border": _NAN,
    "one_nan": _NAN,
    "infinite": _NAN,
    "constant": ("every voxel is 40", "a constant image cannot be used"),
    "uint8": _NO_HU,
    "unsigned": _NO_HU,
    "norm01": _NO_HU,
    "two_phases": ("must be one 3D volume", "split time series"),
    "metres": ("fewer than 2 of the model's", "correct the spacing in the header (mm)"),
}
"""Ways in which users spoil an image: name -> rule and remedy in the message that refuses it."""


def write_bad_image(name: str, cohort: Path, path: Path) -> str:
    """A phantom's image, spoiled in one of the ways of `BAD_IMAGES`."""
    image = nib.load(cohort / "images/subject_003.nii.gz")
    hu, affine = np.asarray(image.dataobj).astype(np.float32), image.affine
    if name == "nan_border":
        hu[:3] = np.nan
    elif name in ("one_nan", "infinite"):
        hu[30, 30, 30] = np.nan if name == "one_nan" else np.inf
    elif name == "constant":
        hu[:] = 40
    elif name == "uint8":
        hu = np.clip((hu + 200) / 1000 * 255, 0, 255).astype(np.uint8)
    elif name == "unsigned":
        hu = (hu + 1024).clip(0).astype(np.uint16)
    elif name == "norm01":
        hu = (hu - hu.min()) / (hu.max() - hu.min())
    elif name == "two_phases":
        hu = np.stack([hu, hu], -1)
    elif name == "metres":
        affine = affine @ np.diag([1e-3, 1e-3, 1e-3, 1])
    nib.save(nib.Nifti1Image(hu, affine), path)
    return str(path)


def messages_of(error: BaseException | None) -> list[str]:
    """Messages of an error and of all that caused it, the innermost last."""
    found = []
    while error is not None:
        found.append(str(error))
        error = error.__cause__ or error.__context__
    return found


def smooth_volume(seed, size=64):
    """A structure of its own with values in [0, 1]."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size,) * 3), 3)
    return np.clip(0.5 + 0.2 * field / field.std(), 0, 1)
