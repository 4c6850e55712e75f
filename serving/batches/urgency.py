"""When a batch stops being patient."""

from __future__ import annotations

import time
from collections.abc import Callable

from penstock.queue.records import PriorityClass, now_ms
from penstock.serving.batches.model import BatchSpec

SAFETY = 0.8
"""A batch that at its present pace would need more than this much of the time left is late already."""
PATIENT_SHARE = 0.5
"""Before half of the window is over the pace says little: a day's load may leave nothing, and the night everything."""
WARM_UP_S = 30.0
"""Nor does that of a coordinator's first seconds: engines fill up, and after a take-over answers come from the log."""


class Urgency:
    """The class of a batch's next line: batch, or standard once the window closes or the pace will not do."""

    def __init__(
        self,
        spec: BatchSpec,
        left: int,
        share: float,
        clock_ms: Callable[[], int] = now_ms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._left = left
        self._share = share
        self._clock_ms = clock_ms
        self._clock = clock
        self._began = clock()
        self._finished = 0

    def finished(self) -> None:
        """One more line is done."""
        self._finished += 1

    def priority(self) -> PriorityClass:
        """The class to send a line in now."""
        window_ms = self._spec.expires_ms - self._spec.created_ms
        left_ms = self._spec.expires_ms - self._clock_ms()
        closing = left_ms <= window_ms * self._share
        slow = left_ms <= window_ms * PATIENT_SHARE and self._needs_s() * 1000 > left_ms * SAFETY
        return PriorityClass.STANDARD if closing or slow else PriorityClass.BATCH

    def _needs_s(self) -> float:
        elapsed = self._clock() - self._began
        if elapsed < WARM_UP_S:
            return 0.0
        return (self._left - self._finished) * elapsed / max(self._finished, 1)
