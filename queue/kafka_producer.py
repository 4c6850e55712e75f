"""Publishing to Kafka from an event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from kafka import KafkaProducer

from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import REQUEST_TIMEOUT_MS, broker_errors, open_client
from penstock.queue.settings import QueueSettings

DELIVERY_TIMEOUT_MS = 4000
"""After this a publish has failed: room for one retry after :data:`REQUEST_TIMEOUT_MS`, and short enough for a
client."""
CLOSE_TIMEOUT_S = DELIVERY_TIMEOUT_MS / 1000
"""Nothing can be in flight for longer."""
_ENVELOPE_BYTES = 64 * 1024
"""Room for headers and framing over the largest record."""


class Publisher:
    """A producer that stores on all in-sync replicas, once, without waiting to fill batches.

    The producer's own thread does the I/O; :meth:`send` runs in the event loop and does not block.
    """

    def __init__(self, queue: QueueSettings, topics: tuple[str, ...]) -> None:
        """Connect and learn the topics. Blocks; raises :class:`QueueUnavailable`."""
        self._producer = open_client(
            KafkaProducer,
            queue,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            max_block_ms=REQUEST_TIMEOUT_MS,
            max_request_size=queue.max_record_bytes + _ENVELOPE_BYTES,
            metrics_enabled=False,
        )
        with broker_errors():
            for topic in topics:  # so that no later send has to wait for it
                self._producer.partitions_for(topic)

    async def send(self, topic: str, value: bytes, headers: dict[str, bytes]) -> None:
        """Store one record. Raises :class:`QueueUnavailable` after :data:`DELIVERY_TIMEOUT_MS` at the latest."""
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()

        def acknowledged(result: Any) -> None:
            loop.call_soon_threadsafe(_resolve, stored, result)

        with broker_errors():
            sent = self._producer.send(topic, value, headers=list(headers.items()))
        sent.add_both(acknowledged)
        await stored

    def close(self) -> None:
        """Finish what is in flight. Blocks."""
        self._producer.close(timeout=CLOSE_TIMEOUT_S)


def _resolve(stored: asyncio.Future[None], result: Any) -> None:
    if stored.done():  # the publisher was cancelled meanwhile
        return
    if isinstance(result, Exception):
        stored.set_exception(QueueUnavailable(f"Kafka did not acknowledge: {result!r}"))
    else:
        stored.set_result(None)
