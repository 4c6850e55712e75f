"""Publishing to Kafka from an event loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError

from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import REQUEST_TIMEOUT_MS, broker_errors, open_client
from penstock.queue.settings import QueueSettings

DELIVERY_TIMEOUT_MS = 4000
"""After this a publish has failed: room for one retry after :data:`REQUEST_TIMEOUT_MS`, and short enough for a
client."""
ANSWER_TIMEOUT_S = DELIVERY_TIMEOUT_MS / 1000 + 1
"""By then the client has told whether a record was stored; what it does not keep, we do."""
_ENVELOPE_BYTES = 64 * 1024
"""Room for headers and framing over the largest record."""


class Publisher:
    """A producer that stores on all in-sync replicas without waiting to fill batches.

    The producer's own thread does the I/O; :meth:`send` runs in the event loop and does not block. Not idempotent:
    a record that is stored twice runs once, and after an outage in which a batch expired the client's idempotent
    producer never asks for a new producer id, nor ever answers again (kafka-python 3.0.12).
    """

    def __init__(self, queue: QueueSettings, topics: tuple[str, ...]) -> None:
        """Connect and learn the topics. Blocks; raises :class:`QueueUnavailable`."""
        self._producer = open_client(
            KafkaProducer,
            queue,
            acks="all",
            enable_idempotence=False,
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
        """Store one record. Raises :class:`QueueUnavailable` after :data:`ANSWER_TIMEOUT_S` at the latest."""
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()

        def acknowledged(result: Any) -> None:
            loop.call_soon_threadsafe(_resolve, stored, result)

        with broker_errors():
            sent = self._producer.send(topic, value, headers=list(headers.items()))
        sent.add_both(acknowledged)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await stored
        except TimeoutError as error:
            raise QueueUnavailable("Kafka did not answer") from error

    def close(self) -> None:
        """Finish what is in flight. Blocks."""
        with suppress(KafkaError):  # the broker is away, and whoever published knows
            self._producer.close(timeout=ANSWER_TIMEOUT_S)


def _resolve(stored: asyncio.Future[None], result: Any) -> None:
    if stored.done():  # the publisher was cancelled meanwhile
        return
    if isinstance(result, Exception):
        stored.set_exception(QueueUnavailable(f"Kafka did not acknowledge: {result!r}"))
    else:
        stored.set_result(None)
