"""An error of the command ends in what is wrong, whatever is wrapped around it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from custom import checks
from custom.checks import cause_of, check_version, show_cause_last
from custom.volumes.reading import LoadVolumesd
from monai.transforms import Compose, Transform
from torch.utils.data import DataLoader, Dataset


def raised(action, *arguments):
    """The exception of a call."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        action(*arguments)
    return caught.value


class Fails(Transform):
    """A transform that is not ours."""

    def __call__(self, data):
        raise KeyError("pred")


class Files(Dataset):
    """Files read by our transform inside MONAI's."""

    def __init__(self, file):
        self.read, self.file = Compose([LoadVolumesd("image")]), file

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.read({"image": self.file})


@pytest.fixture
def damaged(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"no volume")
    return str(tmp_path / "scan.nii.gz")


def test_the_cause_is_our_own_message_not_the_wrapper_nor_the_library_below(damaged):
    error = raised(Files(damaged).__getitem__, 0)
    assert "applying transform" in str(error)
    assert cause_of(error).startswith(f"{damaged}: cannot be read as a volume of numbers")


def test_the_cause_is_found_in_the_text_of_an_error_of_a_loading_process(damaged):
    error = raised(list, DataLoader(Files(damaged), num_workers=1, batch_size=None))
    assert "Original Traceback" in str(error)
    assert cause_of(error).startswith(f"{damaged}: cannot be read as a volume of numbers")


def test_without_one_of_ours_the_innermost_is_the_cause_and_its_kind_is_said():
    assert cause_of(raised(Compose([Fails()]), {})) == "KeyError: 'pred'"
    assert cause_of(raised(torch.zeros(2).view, 3)).startswith("shape '[3]' is invalid")


def test_the_last_line_is_the_cause_and_a_launcher_may_quote_it(tmp_path, monkeypatch, capsys, damaged):
    error = raised(Files(damaged).__getitem__, 0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    show_cause_last(type(error), error, error.__traceback__)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith(f"ERROR: {damaged}: cannot be read")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == lines[-1]


def test_an_interruption_has_no_cause(capsys):
    show_cause_last(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "ERROR" not in capsys.readouterr().err


@pytest.mark.parametrize(("program", "hooked"), [("/x/monai/bundle/__main__.py", True), ("/x/pytest", False)])
def test_only_the_command_of_monai_is_changed(monkeypatch, program, hooked):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    check_version(needed=checks.custom.__version__)
    assert (sys.excepthook is show_cause_last) is hooked
