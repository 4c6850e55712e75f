"""A batch moves up when its window closes, or when its pace will not do."""

from __future__ import annotations

import pytest

from penstock.queue.records import PriorityClass
from penstock.serving.batches.model import BatchSpec
from penstock.serving.batches.urgency import WARM_UP_S, Urgency

pytestmark = pytest.mark.unit
HOUR_MS = 3_600_000


class Clock:
    now_s = 0.0

    def seconds(self) -> float:
        return self.now_s

    def ms(self) -> int:
        return int(self.now_s * 1000)


def urgency(clock: Clock, left: int, share: float = 0.1) -> Urgency:
    spec = BatchSpec(
        id="batch_x",
        tenant="t",
        key_id="k",
        endpoint="/v1/completions",
        input_file_id="file-x",
        completion_window="1h",
        created_ms=0,
        expires_ms=HOUR_MS,
        metadata=None,
        output_expires_after_s=3600,
    )
    return Urgency(spec, left, share, clock.ms, clock.seconds)


def test_it_is_patient_at_first_and_urgent_at_the_end() -> None:
    clock = Clock()
    batch = urgency(clock, 1000)
    assert batch.priority() is PriorityClass.BATCH
    for _ in range(999):
        batch.finished()
    clock.now_s = 3239
    assert batch.priority() is PriorityClass.BATCH
    clock.now_s = 3241
    assert batch.priority() is PriorityClass.STANDARD


def test_too_slow_a_pace_makes_it_urgent_long_before() -> None:
    clock = Clock()
    batch = urgency(clock, 10_000)
    for _ in range(1800):
        batch.finished()
    clock.now_s = 1799
    assert batch.priority() is PriorityClass.BATCH
    clock.now_s = 1801  # a line a second: 8,200 s of work for the 1,799 that are left
    assert batch.priority() is PriorityClass.STANDARD


def test_a_new_coordinator_looks_first() -> None:
    clock = Clock()
    clock.now_s = 2000
    batch = urgency(clock, 10_000)
    assert batch.priority() is PriorityClass.BATCH
    clock.now_s = 2000 + WARM_UP_S
    assert batch.priority() is PriorityClass.STANDARD


def test_a_pace_that_will_do() -> None:
    clock = Clock()
    batch = urgency(clock, 1000)
    clock.now_s = 2000
    for _ in range(800):
        batch.finished()
    assert batch.priority() is PriorityClass.BATCH
