"""Publishing to Kafka from an event loop."""

from __future__ import annotations

import asyncio
from threading import Event, Thread

from confluent_kafka import KafkaError, Message, Producer

from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import REQUEST_TIMEOUT_S, broker_errors, open_client
from penstock.queue.settings import QueueSettings

DELIVERY_TIMEOUT_MS = 4000
"""After this a publish has failed: room for one retry after :data:`REQUEST_TIMEOUT_S`, and short enough for a
client."""
ANSWER_TIMEOUT_S = DELIVERY_TIMEOUT_MS / 1000 + 1
"""By then the client has told whether a record was stored; what it does not keep, we do."""
POLL_S = 0.5
"""How late the thread that takes acknowledgements notices its end; an acknowledgement wakes it at once."""
_ENVELOPE_BYTES = 64 * 1024
"""Room for headers and framing over the largest record."""


class Publisher:
    """A producer that stores on all in-sync replicas without waiting to fill batches.

    The library's own threads do the I/O; :meth:`send` runs in the event loop and does not block. Not idempotent: a
    record that is stored twice runs once.
    """

    def __init__(self, queue: QueueSettings) -> None:
        """Connect. Blocks; raises :class:`QueueUnavailable`."""
        self._producer = open_client(
            Producer,
            queue,
            {
                "acks": "all",
                "linger.ms": 0,
                "message.timeout.ms": DELIVERY_TIMEOUT_MS,
                "request.timeout.ms": int(REQUEST_TIMEOUT_S * 1000),
                "message.max.bytes": queue.max_record_bytes + _ENVELOPE_BYTES,
            },
        )
        self._closed = Event()
        self._thread = Thread(target=self._take_acknowledgements, name="penstock-kafka-acks", daemon=True)
        self._thread.start()

    async def send(self, topic: str, value: bytes, headers: dict[str, bytes]) -> None:
        """Store one record. Raises :class:`QueueUnavailable` after :data:`ANSWER_TIMEOUT_S` at the latest."""
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()

        def acknowledged(error: KafkaError | None, _: Message) -> None:
            loop.call_soon_threadsafe(_resolve, stored, error)

        with broker_errors():
            self._producer.produce(topic, value, headers=list(headers.items()), on_delivery=acknowledged)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await stored
        except TimeoutError as error:
            raise QueueUnavailable("Kafka did not answer") from error

    def close(self) -> None:
        """Finish what is in flight. Blocks."""
        self._producer.flush(ANSWER_TIMEOUT_S)
        self._closed.set()
        self._thread.join()
        self._producer.close()

    def _take_acknowledgements(self) -> None:
        while not self._closed.is_set():
            self._producer.poll(POLL_S)


def _resolve(stored: asyncio.Future[None], error: KafkaError | None) -> None:
    if stored.done():  # the publisher was cancelled meanwhile
        return
    if error is not None:
        stored.set_exception(QueueUnavailable(f"Kafka did not acknowledge: {error}"))
    else:
        stored.set_result(None)
