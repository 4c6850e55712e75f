"""Both backends of the request queue behind one small harness."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence

import redis.asyncio
from confluent_kafka import Producer

from penstock.queue.factory import open_queue
from penstock.queue.protocol import Budget, Delivery, Depth, RequestQueue
from penstock.queue.records import (
    PriorityClass,
    Record,
    new_request_id,
    now_ms,
    pack_tokens,
    prefix_hashes,
)
from penstock.queue.settings import QueueSettings, RedisSettings


def settings(backend: str, bootstrap: str, url: str) -> tuple[QueueSettings, RedisSettings]:
    """Small topics, and keys of one's own."""
    queue = QueueSettings.model_validate({"backend": backend, "bootstrap": bootstrap, "partitions": 2})
    return queue, RedisSettings(url=url, namespace=f"t{uuid.uuid4().hex[:8]}:")


class Harness:
    """Opens queues of one backend on a pool of their own, and closes them after the test."""

    def __init__(self, queue: QueueSettings, redis_settings: RedisSettings) -> None:
        self.settings = queue
        self.redis_settings = redis_settings
        self.pool = uuid.uuid4().hex[:8]
        self.redis = redis.asyncio.Redis.from_url(redis_settings.url)
        self._opened: list[RequestQueue] = []
        self._counter = itertools.count()

    def open(self, **changes: int | str) -> RequestQueue:
        """One more client of the same queue, with changed queue settings."""
        queue = open_queue(self.settings.model_copy(update=changes), self.redis_settings, self.pool)
        self._opened.append(queue)
        return queue

    def record(self, cls: str = "standard", tokens: int = 10, **fields: object) -> Record:
        """A record with every field that matters to a queue."""
        prompt = pack_tokens([(next(self._counter) + i) % 50_000 for i in range(tokens)])
        values: dict[str, object] = {
            "id": new_request_id(),
            "model": "m",
            "pool": self.pool,
            "release": "r0",
            "tenant": "acme",
            "priority_class": PriorityClass(cls),
            "num_tokens": tokens,
            "prompt": prompt,
            "sampling": {"temperature": 0.5, "stop": ["\n"]},
            "reply_to": "ingress-1",
            "accepted_ms": now_ms(),
            "prefix_hashes": prefix_hashes(prompt, "acme"),
            "body": b'{"messages": []}',
        }
        return Record(**values | fields)  # type: ignore[arg-type]

    async def publish_raw(self, data: bytes, tokens: int = 3) -> None:
        """What a broken or newer producer might write, as standard work."""
        if self.settings.backend == "redis":
            prefix = f"{self.redis_settings.namespace}requests:{self.pool}:"
            await self.redis.xadd(prefix + "standard", {"t": tokens, "r": data})
            await self.redis.hincrby(prefix + "tokens", "1", tokens)
        else:
            producer = Producer({"bootstrap.servers": self.settings.bootstrap})
            producer.produce(f"requests.{self.pool}.standard", data, headers=[("t", b"%d" % tokens)])
            assert producer.flush(10) == 0

    async def close(self) -> None:
        """Close everything that was opened."""
        while self._opened:
            await self._opened.pop().close()
        await self.redis.aclose()


PLENTY = Budget(requests=1000, tokens=10_000_000)
NOTHING = dict.fromkeys(PriorityClass, Depth(0, 0, 0.0))


def ids(items: Sequence[Delivery] | Sequence[Record]) -> list[str]:
    """Request ids in order."""
    return [item.record.id if isinstance(item, Delivery) else item.id for item in items]


async def publish_all(queue: RequestQueue, records: Sequence[Record]) -> None:
    """One after the other, so that their order is known."""
    for record in records:
        await queue.publish(record)


async def pull_all(queue: RequestQueue, count: int) -> list[Delivery]:
    """Pull until ``count`` deliveries are on loan."""
    taken: list[Delivery] = []
    while len(taken) < count:
        taken += await queue.pull(PLENTY)
    assert len(taken) == count
    return taken
