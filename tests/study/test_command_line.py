"""What the guide prints of the study's command line can be typed, and a wrong option is refused."""

from __future__ import annotations

import inspect
import re
import shlex

import pytest
from custom.study import __main__ as command_line
from helpers import ROOT, run_module

GUIDES = [ROOT / "README.md", ROOT / "docs/FIVE_CASES.md"]
PRINTED = [found for guide in GUIDES for found in re.findall(r"python -m custom\.study ([^\n`]+)", guide.read_text())]


def test_the_guides_print_every_command():
    assert {line.split()[0] for line in PRINTED} == {"check", "run", "cross_validate", "serve", "export"}


@pytest.mark.parametrize("line", PRINTED)
def test_a_printed_command_fits_its_function(line):
    name, *arguments = shlex.split(line)
    signature = inspect.signature(getattr(command_line, name))
    flags = [argument.removeprefix("--") for argument in arguments if argument.startswith("--")]
    assert set(flags) <= set(signature.parameters)
    positional, values = [], iter(arguments)
    for argument in values:
        if not argument.startswith("--"):
            positional.append(argument)
        elif signature.parameters[argument[2:]].annotation != "bool":
            next(values)
    signature.bind(*positional, **dict.fromkeys(flags))


def test_a_misspelt_option_of_the_phantom_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    arguments = ["make", "--output_dir", str(tmp_path / "out"), "--subject", "3"]
    said = run_module(monkeypatch, tmp_path, "custom.phantom", *arguments)
    assert "ERROR: --subject: there is no such option of make; did you mean --subjects?" in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "none.json"], "ERROR: none.json: datalist not found"),
        (["run", "none.json", "out"], "none.json: datalist not found"),
        (
            ["run", "cases", "out", "--cuont", "3"],
            "ERROR: --cuont: there is no such option of run; did you mean --count?",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, said):
    assert said in run_module(monkeypatch, tmp_path, "custom.study", *arguments)
    assert not [*tmp_path.iterdir()]
