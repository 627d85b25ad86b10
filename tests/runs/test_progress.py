"""Progress said at most so often, with the time that the rest will take."""

import pytest
from custom.runs import progress
from custom.runs.progress import SayProgress, duration
from ignite.engine import Engine, Events


@pytest.mark.parametrize(("seconds", "words"), [(5, "5 s"), (89.4, "89 s"), (95, "2 min"), (5400, "1 h 30 min")])
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("every_s", "lines"),
    [(0.0, {1: "3 min", 2: "2 min", 3: "60 s", 4: "0 s"}), (90.0, {2: "2 min", 4: "0 s"}), (1000.0, {})],
)
def test_lines_come_no_more_often_than_asked_and_tell_the_rest(monkeypatch, caplog, every_s, lines):
    caplog.set_level("INFO")
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: clock.__setitem__(0, clock[0] + 60))
    SayProgress("rendered", every_s=every_s).attach(engine)
    engine.run([0] * 4)
    said = [message for message in caplog.messages if "rendered" in message]
    assert said == [f"case {done} of 4 rendered, about {left} left" for done, left in lines.items()]
