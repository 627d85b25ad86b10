"""A run that needs more memory than the machine has says so, and what to change."""

import logging
import platform
import subprocess
import sys

import pytest
from custom.runs import memory


def test_a_warning_names_both_numbers_and_the_remedy_only_where_memory_is_short(caplog, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 << 30)
    with caplog.at_level(logging.WARNING):
        memory.warn_of_memory(7 << 30, "use fewer --workers")
        assert not caplog.records
        memory.warn_of_memory(20 << 30, "use fewer --workers")
    assert caplog.messages == ["this will need about 20 GiB of memory, the machine has 8; use fewer --workers"]


def test_without_an_answer_of_the_system_nothing_is_said(caplog, monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown, raising=False)
    assert memory.machine_memory() is None
    memory.warn_of_memory(1 << 60, "use fewer --workers")
    assert not caplog.records


def test_the_memory_of_this_machine_is_known():
    assert memory.machine_memory() > 1 << 30


FREED = """
import resource, runpy, sys
import numpy as np
if sys.argv[1] == "kept":
    assert runpy.run_path(sys.argv[2])["keep_freed_memory"]()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 22)
before = faults()
for _ in range(20):
    np.ones(1 << 22)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept_for_the_next_volume():
    def faults_where(how):
        command = [sys.executable, "-c", FREED, how, memory.__file__]  # the file alone: its package takes seconds
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    faults = {how: faults_where(how) for how in ("kept", "given back")}
    assert faults["kept"] * 10 < faults["given back"], faults


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not memory.keep_freed_memory()


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
