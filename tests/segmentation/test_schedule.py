"""When confidence begins to count."""

from __future__ import annotations

import pytest
from custom.segmentation.loss import CALLoss
from custom.segmentation.schedule import ConfidenceSchedule
from ignite.engine import Engine


def test_gamma_is_0_in_the_warm_up_and_then_climbs_to_1():
    loss, seen = CALLoss(gamma=0.0), []
    engine = Engine(lambda *_: seen.append(loss.gamma))
    ConfidenceSchedule(loss, warmup_epochs=2, ramp_epochs=3).attach(engine)
    engine.run([0], max_epochs=8)
    assert seen == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_schedule_of_no_epochs_trusts_from_the_start():
    loss = CALLoss(gamma=0.0)
    engine = Engine(lambda *_: None)
    ConfidenceSchedule(loss, warmup_epochs=0, ramp_epochs=0).attach(engine)
    engine.run([0], max_epochs=1)
    assert loss.gamma == 1
    with pytest.raises(ValueError, match="warmup_epochs, ramp_epochs: must not be negative"):
        ConfidenceSchedule(loss, warmup_epochs=-1, ramp_epochs=0)
