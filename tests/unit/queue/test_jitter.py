"""Pauses that differ."""

from __future__ import annotations

import pytest

from penstock.queue.jitter import jittered

pytestmark = pytest.mark.unit


def test_pauses_differ_within_bounds() -> None:
    pauses = [jittered(2.0) for _ in range(1000)]
    assert 1.0 <= min(pauses) < 1.2
    assert 2.8 < max(pauses) <= 3.0
    assert len(set(pauses)) > 900
