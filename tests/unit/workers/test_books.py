"""A dispatcher's books: what is delivered again."""

from __future__ import annotations

import msgspec
import pytest

from penstock.queue.factory import open_queue
from penstock.queue.protocol import Delivery
from penstock.queue.records import PriorityClass, Record, decode_record
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.workers.books import Books
from penstock.workers.errand import Errand
from tests.support.requests import make_record
from tests.unit.workers.test_routing import MIXED, make_router

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
BATCH, STANDARD = PriorityClass.BATCH, PriorityClass.STANDARD


def delivery(record: Record, position: str) -> Delivery:
    return Delivery(record, ("", 0, position))


def sent_class(errand: Errand) -> PriorityClass:
    """The class an engine is told."""
    return decode_record(bytes(errand._encoded)).priority_class


async def test_the_better_class_counts() -> None:
    """Published again in a better class, a request may use the room that is kept from batch work."""
    router = make_router(MIXED | {"reserved_share": 0.5}, "mixed1")
    books = Books(open_queue(QueueSettings(), RedisSettings(), "p"), router)
    records = [make_record(5, priority_class=BATCH) for _ in range(2)]
    for record in records:
        books.admit(delivery(record, record.id))
    (placed,) = books.place()
    (waiting,) = books.waiting.values()
    assert books.place() == []
    books.placeable.clear()
    books.admit(delivery(msgspec.structs.replace(waiting.record, priority_class=STANDARD), "again"))
    assert books.placeable.is_set()
    assert books.place() == [waiting]
    assert (waiting.rank, sent_class(waiting)) == (STANDARD.rank, STANDARD)
    assert (placed.rank, sent_class(placed)) == (BATCH.rank, BATCH)
    assert len(waiting.deliveries) == 2


async def test_a_worse_class_changes_nothing() -> None:
    books = Books(open_queue(QueueSettings(), RedisSettings(), "p"), make_router(MIXED, "mixed1"))
    record = make_record(5, priority_class=STANDARD)
    books.admit(delivery(record, "1"))
    books.admit(delivery(msgspec.structs.replace(record, priority_class=BATCH), "2"))
    (errand,) = books.errands.values()
    assert (errand.rank, sent_class(errand)) == (STANDARD.rank, STANDARD)
