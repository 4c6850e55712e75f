"""Opens the queue a deployment is configured for."""

from __future__ import annotations

from penstock.queue.protocol import RequestQueue
from penstock.queue.redis_streams import RedisStreamsQueue
from penstock.queue.settings import QueueSettings, RedisSettings


def open_queue(queue: QueueSettings, redis: RedisSettings, pool: str) -> RequestQueue:
    """The queue of ``pool``. Must be called in the event loop that will use it; connects on first use."""
    if queue.backend == "kafka":
        from penstock.queue.kafka import KafkaQueue  # heavy, and not needed by the embedded default

        return KafkaQueue(queue, redis, pool)
    return RedisStreamsQueue(queue, redis, pool)
