"""``python -m tests.benchmarks.queue_rates RECORDS``: how fast the configured queue takes and gives records.

One process publishes as many as an ingress under load has open at once, then pulls and completes them as a dispatcher
does. Started by :class:`tests.benchmarks.rig.Client`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine

import uvloop

from penstock.queue.factory import open_queue
from penstock.queue.protocol import Budget, RequestQueue
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from tests.benchmarks.rig import serve_client
from tests.benchmarks.rig_client import record

OPEN_AT_ONCE = 64
PULL = Budget(requests=128, tokens=1_000_000)


async def publish(queue: RequestQueue, model: ModelSettings, records: int) -> None:
    """All of them, :data:`OPEN_AT_ONCE` under way at any time."""
    numbers = iter(range(records))

    async def one_after_the_other() -> None:
        for number in numbers:
            await queue.publish(record(model, "ingress:none", number, 1))

    await asyncio.gather(*(one_after_the_other() for _ in range(OPEN_AT_ONCE)))


async def pull(queue: RequestQueue, records: int) -> None:
    """So many, each batch completed before the next is taken."""
    left = records
    while left > 0:
        deliveries = await queue.pull(PULL)
        await queue.complete(deliveries)
        left -= len(deliveries)


async def measure(records: int) -> dict[str, float]:
    """Rates a second, and CPU seconds of this process per 1,000 records; consumer and publisher are not there at once.

    The clocks run from the second record published, and from the second batch pulled: connections, topics and groups
    have come to be then.
    """
    model, found = ModelSettings(), dict[str, float]()
    publisher = open_queue(QueueSettings(), RedisSettings(), model.pool)
    await publish(publisher, model, 1)
    found |= await _timed("publish", publish(publisher, model, records), records)
    await publisher.close()
    consumer = open_queue(QueueSettings(), RedisSettings(), model.pool)
    first = await consumer.pull(PULL)
    left = 1 + records - len(first)
    found |= await _timed("pull", pull(consumer, left), left)
    await consumer.complete(first)
    await consumer.close()
    return found


async def _timed(name: str, work: Coroutine[None, None, None], records: int) -> dict[str, float]:
    started, cpu = time.monotonic(), time.process_time()
    await work
    return {
        f"{name}_records_per_s": records / (time.monotonic() - started),
        f"{name}_cpu_s_per_1k_records": (time.process_time() - cpu) / records * 1000,
    }


if __name__ == "__main__":
    serve_client(lambda: uvloop.run(measure(int(sys.argv[1]))))
