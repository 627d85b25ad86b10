"""A run that needs more memory than the machine has says so, and what to change."""

import logging

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
