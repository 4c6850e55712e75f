"""Deadlines where no dispatcher looks, against a real Redis. [I5]"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable

import pytest
import pytest_asyncio

from penstock.queue.errors import StoreUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.messages import Finish, Frame
from penstock.queue.records import Record, now_ms
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import RequestLog
from penstock.serving import deadlines as deadlines_module
from penstock.serving.deadlines import LATE, SLACK_S, Deadlines
from tests.contract.queue.ingresses import CHANNEL, Ingress
from tests.support.requests import make_record
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

PATIENCE_S = 20
LONG_AGO = -int(SLACK_S * 1000) - 1


@pytest_asyncio.fixture
async def ingress(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ingress]:
    monkeypatch.setattr(deadlines_module, "LOOK_S", 0.01)
    opened = Ingress(RedisSettings(url=redis_server.url, namespace=f"dl{uuid.uuid4().hex[:8]}:"))
    await opened.start()
    yield opened
    await opened.close()


def due(ingress: Ingress, in_ms: int) -> Record:
    """A record in the broker, whose client waits here."""
    record = make_record(reply_to=CHANNEL, deadline_ms=now_ms() + in_ms)
    ingress.reader.open(record.id)
    return record


async def ended(ingress: Ingress, local: str) -> None:
    async def has_end() -> bool:
        return any(frame.finish is not None for frame in ingress.seen.get(local, []))

    await eventually_async(has_end, PATIENCE_S, f"the end at {local}")


async def test_what_waits_in_the_broker_ends_after_its_deadline(ingress: Ingress) -> None:
    late, in_slack, early = due(ingress, LONG_AGO), due(ingress, -1), due(ingress, 600_000)
    deadlines = Deadlines(ingress.reader)
    for record in (in_slack, early, late):
        deadlines.watch(record.id, record)
    await ended(ingress, late.id)
    assert ingress.seen[late.id] == [LATE]
    assert early.id not in ingress.seen
    await ended(ingress, in_slack.id)
    assert early.id not in ingress.seen


async def test_all_readers_of_a_request_see_its_end(ingress: Ingress) -> None:
    record = due(ingress, LONG_AGO)
    ingress.reader.open(record.id, "again")
    deadlines = Deadlines(ingress.reader)
    for local in (record.id, "again"):
        deadlines.watch(local, record)
    for local in (record.id, "again"):
        await ended(ingress, local)


async def test_a_proper_end_that_was_missed_is_read(ingress: Ingress) -> None:
    record = due(ingress, LONG_AGO)
    await ingress.dispatch(record.id)
    ingress.emit_unheard(record.id, 0, Finish.STOP)
    Deadlines(ingress.reader).watch(record.id, record)
    await ended(ingress, record.id)
    assert [frame.finish for frame in ingress.seen[record.id]] == [Finish.STOP]
    assert len(await ingress.log.read(record.id)) == 1


async def test_who_went_away_ends_nothing(ingress: Ingress) -> None:
    gone, marker = due(ingress, LONG_AGO), due(ingress, LONG_AGO)
    deadlines = Deadlines(ingress.reader)
    deadlines.watch(gone.id, gone)
    deadlines.forget(gone.id)
    deadlines.watch(marker.id, marker)
    await ended(ingress, marker.id)
    assert await ingress.log.read(gone.id) == []


class Failing(RequestLog):
    """A real log that is away at first."""

    failures = 3

    async def finish(self, entries: Iterable[tuple[str, str, Frame]]) -> list[bool]:
        self.failures -= 1
        if self.failures >= 0:
            raise StoreUnavailable("Redis is unavailable")
        return await super().finish(entries)


async def test_it_is_tried_until_redis_answers(ingress: Ingress) -> None:
    record = due(ingress, LONG_AGO)
    ingress.reader.log = Failing(ingress.client, ingress.settings)
    Deadlines(ingress.reader).watch(record.id, record)
    await ended(ingress, record.id)
    assert ingress.seen[record.id] == [LATE]
