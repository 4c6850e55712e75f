"""A consumer to be killed: takes everything, finishes every other request, says which, and works on."""

from __future__ import annotations

import asyncio
import json
import sys

from penstock.queue.factory import open_queue
from penstock.queue.protocol import Budget, Delivery
from penstock.queue.settings import QueueSettings, RedisSettings


async def main(queue_json: str, redis_json: str, pool: str, count: str) -> None:
    """Never returns."""
    queue = open_queue(
        QueueSettings.model_validate_json(queue_json), RedisSettings.model_validate_json(redis_json), pool
    )
    taken: list[Delivery] = []
    while len(taken) < int(count):
        taken += await queue.pull(Budget(1000, 10_000_000))
    await queue.complete(taken[::2])
    await queue.depth()  # returns when the completions are durable
    print(json.dumps([delivery.record.id for delivery in taken[::2]]), flush=True)
    await queue.pull(Budget(1, 1))


asyncio.run(main(*sys.argv[1:]))
