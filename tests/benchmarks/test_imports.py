"""Benchmarks run now and then; what they import must be there all the time."""

import importlib

import pytest
from helpers import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


def test_there_are_benchmarks():
    assert {"common", "cost", "ssv"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_can_be_imported(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name}: say what is measured, and the command"
    assert (ROOT / "benchmarks" / f"{name}.py").samefile(module.__file__)
