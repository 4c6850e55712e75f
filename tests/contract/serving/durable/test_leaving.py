"""Requests whose readers went away, against a real Redis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from penstock.queue.errors import StoreUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.readers import Readers
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.durable import leaving as leaving_module
from penstock.serving.durable.leaving import Leaving
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

PATIENCE_S = 20


class Counting(Readers):
    """Real readers that count calls, and can be made to fail."""

    calls = 0
    failures = 0

    async def detach(self, ids: Sequence[str]) -> list[str]:
        self.calls += 1
        if self.calls <= self.failures:
            raise StoreUnavailable("Redis is unavailable")
        return await super().detach(ids)


@pytest_asyncio.fixture
async def readers(redis_server: RedisServer) -> AsyncIterator[Counting]:
    settings = RedisSettings(url=redis_server.url, namespace=f"lv{uuid.uuid4().hex[:8]}:")
    async with connect_async(settings) as client:
        yield Counting(client, settings, "ingress:a")


async def cancelled(readers: Readers, ids: list[str]) -> list[str]:
    """Which of these are."""
    marks = [await readers._client.hget(f"{readers._ns}req:{id_}", "cancelled") for id_ in ids]
    return [id_ for id_, mark in zip(ids, marks, strict=True) if mark is not None]


async def until_cancelled(readers: Readers, ids: list[str]) -> None:
    async def all_are() -> bool:
        return await cancelled(readers, ids) == ids

    await eventually_async(all_are, PATIENCE_S, "all are cancelled")


async def test_a_thousand_leave_in_a_few_calls(readers: Counting) -> None:
    leaving = Leaving(readers, lambda _: False)
    ids = [f"r{number}" for number in range(1000)]
    for id_ in ids:
        leaving.add(id_, 0.01)
    await until_cancelled(readers, ids)
    assert readers.calls < 100


async def test_it_is_tried_until_redis_answers(readers: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving_module, "RETRY_S", 0.01)
    readers.failures = 5
    Leaving(readers, lambda _: False).add("r", 0)
    await until_cancelled(readers, ["r"])
    assert readers.calls == 6


async def test_who_has_another_reader_here_stays(readers: Counting) -> None:
    leaving = Leaving(readers, {"stays"}.__contains__)
    for id_ in ("stays", "goes"):
        leaving.add(id_, 0.01)
    await until_cancelled(readers, ["goes"])
    assert await cancelled(readers, ["stays"]) == []


async def test_what_may_go_on_is_let_go_and_not_stopped(readers: Counting) -> None:
    await readers.attach(["background"])
    leaving = Leaving(readers, lambda _: False)
    leaving.add("background", 0, stop=False)
    leaving.add("r", 0)
    await until_cancelled(readers, ["r"])
    assert await cancelled(readers, ["background"]) == []
    assert await readers._client.hget(f"{readers._ns}req:background", "reply_to") == b""


async def test_who_comes_back_within_the_grace_is_not_let_go(readers: Counting) -> None:
    here: set[str] = set()
    leaving = Leaving(readers, here.__contains__)
    leaving.add("r", 0.05)
    here.add("r")
    leaving.add("marker", 0.06)
    await until_cancelled(readers, ["marker"])
    await asyncio.sleep(0)
    assert await cancelled(readers, ["r"]) == []
