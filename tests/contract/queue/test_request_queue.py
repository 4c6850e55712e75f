"""What every backend of the request queue promises, tried against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from penstock.queue.errors import QueueUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.protocol import Bound, Budget, Delivery, RequestQueue
from penstock.queue.records import PriorityClass, Record
from tests.contract.queue.harness import NOTHING, PLENTY, Harness, ids, publish_all, pull_all, settings
from tests.contract.servers import Server

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

SCRIPT = Path(__file__).with_name("consume_half.py")
CLASSES = ("interactive", "standard", "batch")


async def waiting(harness: Harness, queue: RequestQueue, records: Sequence[Record]) -> None:
    """Publish and bring everything to the consumer, so that what the next pull chooses from is known."""
    await publish_all(queue, records)
    await queue.release(await pull_all(queue, len(records)))


async def test_a_record_arrives_whole(harness: Harness) -> None:
    queue = harness.open()
    record = harness.record(tokens=500, deadline_ms=123, tags={"team": "x"}, trace={"traceparent": "00-1"})
    await queue.publish(record)
    (delivery,) = await queue.pull(PLENTY)
    assert delivery.record == record
    assert delivery.deliveries == 1


async def test_pull_waits_for_work(harness: Harness) -> None:
    consumer, publisher = harness.open(), harness.open()
    await waiting(harness, consumer, [harness.record()])
    await consumer.complete(await consumer.pull(PLENTY))
    pull = asyncio.create_task(consumer.pull(PLENTY))
    record = harness.record()
    await publisher.publish(record)
    assert ids(await pull) == [record.id]


async def test_classes_are_strict_and_each_is_in_order(harness: Harness) -> None:
    queue = harness.open(partitions=1)
    records = [harness.record(cls) for _ in range(4) for cls in reversed(CLASSES)]
    await waiting(harness, queue, records)
    expected = [record.id for cls in CLASSES for record in records if record.priority_class == cls]
    taken = [(await queue.pull(Budget(1, 1000)))[0] for _ in records]
    assert ids(taken) == expected


async def test_a_pull_keeps_to_both_budgets(harness: Harness) -> None:
    queue = harness.open(partitions=1)
    records = [harness.record(tokens=40) for _ in range(10)]
    await waiting(harness, queue, records)
    assert len(await queue.pull(Budget(requests=3, tokens=1000))) == 3
    assert len(await queue.pull(Budget(requests=10, tokens=119))) == 2
    assert len(await queue.pull(Budget(requests=10, tokens=120))) == 3
    assert ids(await queue.pull(PLENTY)) == ids(records[8:])


async def test_an_oversize_record_is_delivered_alone(harness: Harness) -> None:
    queue = harness.open(partitions=1)
    records = [harness.record(tokens=10), harness.record(tokens=5000), harness.record(tokens=10)]
    await waiting(harness, queue, records)
    pulls = [ids(await queue.pull(Budget(10, 100))) for _ in records]
    assert pulls == [[record.id] for record in records]


async def test_batch_work_does_not_jump_over_a_long_interactive_request(harness: Harness) -> None:
    queue = harness.open()
    records = [
        harness.record("interactive", 10),
        harness.record("interactive", 95),
        harness.record("batch", 5),
    ]
    await waiting(harness, queue, records)
    assert ids(await queue.pull(Budget(10, 100))) == [records[0].id]
    assert ids(await queue.pull(Budget(10, 100))) == ids(records[1:])


async def test_a_class_keeps_to_its_bound(harness: Harness) -> None:
    """[I9] Batch work leaves room that the others may use up; what it was not given is not lost."""
    queue = harness.open(partitions=1)
    batch = [harness.record("batch", 10) for _ in range(6)]
    await waiting(harness, queue, batch)
    whole = Bound(6, 1000)
    assert ids(await queue.pull(Budget(6, 1000, (whole, whole, Bound(4, 1000))))) == ids(batch[:4])
    assert ids(await queue.pull(Budget(6, 1000, (whole, whole, Bound(6, 15))))) == ids(batch[4:5])
    urgent = [harness.record("interactive", 10) for _ in range(3)]
    await publish_all(queue, urgent)
    taken: list[str] = []
    while len(taken) < 3:
        taken += ids(await queue.pull(Budget(6, 1000, (whole, whole, Bound(0, 0)))))
    assert taken == ids(urgent)
    assert ids(await pull_all(queue, 1)) == ids(batch[5:])


async def test_a_class_without_room_does_not_block_the_others(harness: Harness) -> None:
    """A pull for the urgent alone waits for them, whatever else there is, and hoards nothing."""
    queue = harness.open(partitions=1)
    batch = [harness.record("batch") for _ in range(5)]
    await publish_all(queue, batch)
    pull = asyncio.create_task(queue.pull(Budget(5, 1000, (Bound(5, 1000), Bound(0, 0), Bound(0, 0)))))
    interactive = harness.record("interactive")
    await queue.publish(interactive)
    assert ids(await pull) == [interactive.id]
    found = ids(await pull_all(queue, 5))
    assert sorted(found) == sorted(ids(batch))


async def test_released_work_comes_back_ahead_of_later_arrivals(harness: Harness) -> None:
    queue = harness.open(partitions=1)
    records = [harness.record() for _ in range(3)]
    await publish_all(queue, records[:2])
    taken = await pull_all(queue, 2)
    await queue.publish(records[2])
    await queue.release(taken)
    again = await pull_all(queue, 3)
    assert ids(again) == ids(records)
    assert [delivery.deliveries for delivery in again] == [2, 2, 1]


async def test_release_wakes_a_waiting_pull(harness: Harness) -> None:
    queue = harness.open()
    await queue.publish(harness.record())
    taken = await queue.pull(PLENTY)
    pull = asyncio.create_task(queue.pull(PLENTY))
    await asyncio.sleep(0)
    await queue.release(taken)
    assert ids(await pull) == ids(taken)


async def test_a_cancelled_pull_loses_nothing(harness: Harness) -> None:
    queue = harness.open()
    records = [harness.record() for _ in range(30)]
    seen: list[Delivery] = []
    for record in records:
        pull = asyncio.create_task(queue.pull(PLENTY))
        await queue.publish(record)
        pull.cancel()
        (result,) = await asyncio.gather(pull, return_exceptions=True)
        seen += result if isinstance(result, list) else []
    seen += await pull_all(queue, len(records) - len(seen))
    assert sorted(ids(seen)) == sorted(ids(records))


async def test_finished_work_never_comes_back(harness: Harness) -> None:
    """Out of order, over a restart: what was below and what was above the watermark."""
    first = harness.open()
    records = [harness.record(cls) for cls in CLASSES for _ in range(8)]
    await publish_all(first, records)
    taken = await pull_all(first, len(records))
    done = taken[1::2]
    await first.complete(done[::-1])
    await first.close()
    rest = await pull_all(harness.open(), len(records) - len(done))
    assert sorted(ids(rest)) == sorted(set(ids(records)) - set(ids(done)))


async def test_completing_twice_is_harmless(harness: Harness) -> None:
    queue = harness.open()
    await publish_all(queue, [harness.record(), harness.record()])
    taken = await pull_all(queue, 2)
    await queue.complete(taken[:1])
    await queue.complete(taken[:1])
    depth = await queue.depth()
    assert depth[PriorityClass.STANDARD][:2] == (1, 10)


async def test_depth_is_exact_whatever_happens_to_a_request(harness: Harness) -> None:
    queue, observer = harness.open(), harness.open()

    async def counts() -> list[tuple[int, int]]:
        await queue.depth()  # commits what this consumer finished
        depth = await observer.depth()
        assert all((row.requests == 0) <= (row.oldest_age_s == 0) for row in depth.values())
        return [(row.requests, row.tokens) for row in depth.values()]

    assert await observer.depth() == NOTHING
    await publish_all(queue, [harness.record(cls, tokens) for cls in CLASSES for tokens in (10, 20, 30)])
    assert await counts() == [(3, 60)] * 3
    taken = await pull_all(queue, 9)
    assert await counts() == [(3, 60)] * 3
    await queue.release(taken[:1])
    assert await counts() == [(3, 60)] * 3
    interactive = [item for item in taken[1:] if item.record.priority_class == PriorityClass.INTERACTIVE]
    await queue.complete(interactive[:1])
    left = 60 - interactive[0].record.num_tokens
    assert await counts() == [(2, left), (3, 60), (3, 60)]
    await queue.dead_letter(interactive[1], "no")
    assert await counts() == [(1, left - interactive[1].record.num_tokens), (3, 60), (3, 60)]
    await queue.complete([*taken[1:], *await queue.pull(PLENTY)])
    await queue.depth()
    assert await observer.depth() == NOTHING


async def test_depth_tells_the_age_of_the_oldest(harness: Harness) -> None:
    queue = harness.open()
    await queue.publish(harness.record())
    ages = [0.0]
    while ages[-1] < 0.05:
        ages.append((await queue.depth())[PriorityClass.STANDARD].oldest_age_s)
    assert ages == sorted(ages)


async def test_two_consumers_share_the_work(harness: Harness) -> None:
    consumers, publisher = [harness.open(), harness.open()], harness.open()
    received: list[list[str]] = [[], []]
    progress = asyncio.Event()

    async def consume(number: int) -> None:
        while True:
            deliveries = await consumers[number].pull(Budget(1, 100_000))
            received[number] += ids(deliveries)
            progress.set()
            await consumers[number].complete(deliveries)

    records = [harness.record(cls) for cls in CLASSES for _ in range(20)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(consume(number)) for number in range(2)]
        while not all(received):  # both have a share
            progress.clear()
            await publisher.publish(harness.record())
            await progress.wait()
        await publish_all(publisher, records)
        while not set(ids(records)) <= {*received[0], *received[1]}:
            progress.clear()
            await progress.wait()
        for task in tasks:
            task.cancel()
    shares = [[id_ for id_ in share if id_ in set(ids(records))] for share in received]
    assert sorted(shares[0] + shares[1]) == sorted(ids(records))
    assert all(shares)


async def test_a_killed_consumer_loses_nothing_and_repeats_nothing_finished(harness: Harness) -> None:
    records = [harness.record(cls) for cls in CLASSES for _ in range(4)]
    await publish_all(harness.open(), records)
    settings = [harness.settings.model_dump_json(), harness.redis_settings.model_dump_json(), harness.pool]
    consumer = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, *settings, str(len(records)), stdout=asyncio.subprocess.PIPE
    )
    assert consumer.stdout is not None
    done = json.loads(await consumer.stdout.readline())
    consumer.kill()
    await consumer.wait()
    rest = await pull_all(harness.open(), len(records) - len(done))
    assert sorted(ids(rest)) == sorted(set(ids(records)) - set(done))


@pytest.mark.parametrize("operation", ["publish", "ping"])
async def test_an_absent_broker_is_told(harness: Harness, operation: str) -> None:
    broken = Harness(
        harness.settings.model_copy(update={"bootstrap": "127.0.0.1:1"}),
        harness.redis_settings.model_copy(update={"url": "redis://127.0.0.1:1/0"}),
    )
    queue = broken.open()
    with pytest.raises(QueueUnavailable):
        await (queue.publish(broken.record()) if operation == "publish" else queue.ping())
    await broken.close()


async def test_an_outage_loses_nothing_and_is_told(outage: tuple[Harness, Server]) -> None:
    """The broker is killed and comes back: work on loan, finished work and the clients all survive."""
    harness, server = outage
    queue, publisher = harness.open(), harness.open()
    records = [harness.record() for _ in range(4)]
    await publish_all(publisher, records)
    taken = await pull_all(queue, len(records))
    await queue.complete(taken[:1])
    await queue.depth()
    await asyncio.to_thread(server.kill)
    for client in (queue, publisher):
        with pytest.raises(QueueUnavailable):
            await client.publish(harness.record())
        with pytest.raises(QueueUnavailable):
            await client.ping()
    await asyncio.to_thread(server.start)
    late = harness.record()
    await recovered(lambda: publisher.publish(late))
    await queue.close()
    survivors = harness.open()
    found: set[str] = set()
    while not {late.id, *ids(taken[1:])} <= found:
        with contextlib.suppress(QueueUnavailable):
            found |= set(ids(await survivors.pull(PLENTY)))
    assert taken[0].record.id not in found


async def recovered(operation: Callable[[], Awaitable[None]]) -> None:
    """Try until the broker is there again, as callers do."""
    while True:
        with contextlib.suppress(QueueUnavailable):
            return await operation()


async def test_a_redis_that_lost_its_data_is_used_again(redis_server: RedisServer) -> None:
    """The operator's choice of persistence decides what is lost; the consumers go on by themselves."""
    harness = Harness(*settings("redis", "127.0.0.1:9", redis_server.url))
    queue, record = harness.open(), harness.record()
    await queue.publish(harness.record())
    await queue.pull(PLENTY)
    await harness.redis.delete(*await harness.redis.keys(f"{harness.redis_settings.namespace}*"))
    await queue.publish(record)
    found: list[str] = []
    while record.id not in found:
        with contextlib.suppress(QueueUnavailable):
            found += ids(await queue.pull(PLENTY))
    await harness.close()
