"""Shared fixtures: a tiny phantom cohort and a way to run a bundle config in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from custom.diffusion.coarse import CoarseUNet
from custom.phantom.cohort import make
from helpers import BUNDLE, SEG_BUNDLE, network_of_prior, workflow_of
from monai.bundle import ConfigWorkflow


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms of 58^3 at 2.5 mm: two for training, one for validation, one for test."""
    directory = tmp_path_factory.mktemp("cohort")
    make(str(directory), subjects=4, shape=(58, 58, 58), spacing_mm=2.5, validation_fraction=0.25, test_fraction=0.25)
    return directory


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that renders the prior and 10 HU of noise: enough to see where things land.

    The coarse stage beside it is that of `TINY_COARSE`, untrained: it draws noise of 450 HU around -250 HU.
    """
    directory = tmp_path_factory.mktemp("weights")
    torch.save(network_of_prior().state_dict(), directory / "model.pt")
    torch.save(CoarseUNet(channels=(8, 16)).state_dict(), directory / "coarse.pt")
    return directory


@pytest.fixture
def workflow() -> Callable[..., ConfigWorkflow]:
    """Workflows of the generator."""
    return workflow_of(BUNDLE)


@pytest.fixture
def seg_workflow() -> Callable[..., ConfigWorkflow]:
    """Workflows of the segmenter."""
    return workflow_of(SEG_BUNDLE)
