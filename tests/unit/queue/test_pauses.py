"""Who waits for the same thing does not come back at the same time."""

from __future__ import annotations

import pytest

from penstock.queue.pauses import jittered

pytestmark = pytest.mark.unit


def test_pauses_differ_and_stay_near() -> None:
    pauses = [jittered(2.0) for _ in range(1000)]
    assert len(set(pauses)) > 900
    assert min(pauses) < 1.2 < 2.8 < max(pauses)
    assert all(1.0 <= pause <= 3.0 for pause in pauses)
