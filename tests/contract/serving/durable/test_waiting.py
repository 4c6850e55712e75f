"""What waits in the broker, with nobody there to pull it. [I5]"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from penstock.queue.records import PriorityClass
from penstock.queue.redis_client import connect
from tests.contract.serving.durable.test_resume import CHAT, chat
from tests.support.simulated_stack import SimulatedStack
from tests.support.sse import read
from tests.support.waiting import eventually

pytestmark = [pytest.mark.contract, pytest.mark.timeout(700)]

PATIENCE_S = 60


@pytest.fixture
def nobody_pulls(stack: SimulatedStack) -> Iterator[None]:
    dispatchers = stack.of_kind("dispatcher")
    for part in dispatchers:
        stack.pause(part)
    yield
    for part in dispatchers:
        stack.wake(part)


def waiting(stack: SimulatedStack) -> int:
    """Records in the broker."""
    with connect(stack.redis_settings) as store:
        names = [f"{stack.redis_settings.namespace}requests:default:{cls}" for cls in PriorityClass]
        return sum(int(store.xlen(name)) for name in names)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nobody_pulls")
def test_it_ends_after_its_deadline(stack: SimulatedStack, http: httpx.Client) -> None:
    reply = http.post(stack.urls[0] + CHAT, json=chat(stream=False), headers={"X-Request-Timeout-Ms": "500"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.usefixtures("nobody_pulls")
def test_its_cancellation_ends_it(stack: SimulatedStack, http: httpx.Client) -> None:
    here, there = stack.urls
    name, before = uuid.uuid4().hex, waiting(stack)
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(read, http, "POST", here + CHAT, json=chat(), headers={"X-Request-Id": name})
        eventually(lambda: waiting(stack) > before, PATIENCE_S, "it is in the broker")
        assert http.post(f"{there}/v1/streams/{name}/cancel").json()["cancelled"] is True
        assert posted.result(PATIENCE_S).status == 200
