"""When confidence begins to count."""

from __future__ import annotations

import logging

from custom.segmentation.loss import CALLoss
from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)


class ConfidenceSchedule:
    """Raise the exponent of the confidence in a :class:`custom.segmentation.loss.CALLoss` from 0 to 1, by epochs.

    During the first epochs confidence says nothing yet about what the segmenter finds hard; it first learns from all.

    Args:
        loss: whose `gamma` is set.
        warmup_epochs: so many epochs with gamma 0.
        ramp_epochs: so many more until gamma is 1, in equal steps.

    Raises:
        ValueError: for a negative number of epochs.
    """

    def __init__(self, loss: CALLoss, *, warmup_epochs: int, ramp_epochs: int) -> None:
        if warmup_epochs < 0 or ramp_epochs < 0:
            raise ValueError(f"warmup_epochs, ramp_epochs: must not be negative, got {warmup_epochs}, {ramp_epochs}")
        self.loss, self.warmup_epochs, self.ramp_epochs = loss, warmup_epochs, ramp_epochs

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set gamma; epochs count from 1."""
        done = engine.state.epoch - self.warmup_epochs
        self.loss.gamma = min(max(done / (self.ramp_epochs + 1), 0.0), 1.0)
