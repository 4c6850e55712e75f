"""How long a request that replicas died with has to wait."""

from __future__ import annotations

import pytest

from penstock.queue.protocol import Delivery
from penstock.workers import errand
from penstock.workers.errand import BACKOFF_MAX_S, BACKOFF_S, Errand
from tests.support.requests import make_record

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("deaths", "pause_s"), [(1, 0.0), (2, BACKOFF_S), (3, 2 * BACKOFF_S), (20, BACKOFF_MAX_S)])
def test_pauses_grow_up_to_a_bound(monkeypatch: pytest.MonkeyPatch, deaths: int, pause_s: float) -> None:
    now_s = 1000.0
    monkeypatch.setattr(errand.time, "monotonic", lambda: now_s)
    waiting = Errand(Delivery(make_record(), ("", 0, "")))
    waiting.suspect(deaths)
    assert waiting.ready == (pause_s == 0)
    now_s += 0.49 * pause_s
    assert waiting.ready == (pause_s == 0)
    now_s = 1000.0 + 1.51 * pause_s
    assert waiting.ready
