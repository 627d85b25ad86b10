"""How far a run is, and how long still, for a terminal and a log alike."""

from __future__ import annotations

import logging
import time

from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class SayProgress:
    """Handler of an engine that goes once through cases: says which one it is at and how long the rest will take.

    Args:
        what: is done with a case: "rendered", "segmented".
        every_s: seconds between two lines, at least.
    """

    def __init__(self, what: str, *, every_s: float = 10.0) -> None:
        self.what, self.every_s = what, every_s
        self._began = self._said = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to an engine."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.say)

    def begin(self, engine: Engine) -> None:
        """Look at the clock."""
        self._began = self._said = time.monotonic()

    def say(self, engine: Engine) -> None:
        """Say it, unless the last line is not long ago."""
        now, done, total = time.monotonic(), engine.state.iteration, engine.state.epoch_length
        if total and now - self._said >= self.every_s:
            self._said = now
            left = (now - self._began) / done * (total - done)
            logger.info("case %d of %d %s, about %s left", done, total, self.what, duration(left))
