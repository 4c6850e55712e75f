"""The request queue on Apache Kafka.

One topic per class, ``requests.{pool}.{class}``, and ``requests.{pool}.dead``; one consumer group, ``penstock.{pool}``,
in which each process has a consumer a class.
A publish is acknowledged by all in-sync replicas. Deliveries finish in any order: the committed offset is a watermark
and its metadata names what is finished above it (:mod:`penstock.queue.ledger`). A topic's ``retention.ms`` must be
longer than requests may wait.

A consumer that reached the broker once waits in :meth:`KafkaQueue.pull` through an outage, as for work.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from confluent_kafka.admin import AdminClient

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.errors import QueueUnavailable
from penstock.queue.intake import Entry, Intake
from penstock.queue.kafka_client import (
    REASON_HEADER,
    REQUEST_TIMEOUT_S,
    TOKENS_HEADER,
    Topics,
    broker_errors,
    ensure_topics,
    open_client,
    session_s,
)
from penstock.queue.kafka_consumer import STALL_S, PollThread
from penstock.queue.kafka_dead import DeadLetterTopic
from penstock.queue.kafka_depth import BacklogCounter
from penstock.queue.kafka_producer import Publisher
from penstock.queue.payloads import RecordCodec, connect_once
from penstock.queue.protocol import Budget, Delivery, Depth
from penstock.queue.records import PriorityClass, Record
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.queue.unreadable import Unreadable

CALL_TIMEOUT_S = 5.0
"""For an administrative call; over the client's own request timeout with one retry."""
DEPTH_TIMEOUT_S = 15.0
"""Over the time that reading the backlog may take."""
BUFFER_REQUESTS = 2048
BUFFER_TOKENS = 4_000_000
"""A class that holds this many requests or prompt tokens (16 MB) here is not read further until half are gone."""

T = TypeVar("T")


class KafkaQueue:
    """:class:`~penstock.queue.protocol.RequestQueue` of one pool on Apache Kafka."""

    def __init__(self, queue: QueueSettings, redis: RedisSettings, pool: str) -> None:
        self._settings = queue
        self._topics = Topics.of(pool)
        self._payloads = connect_once(redis)
        self._codec = RecordCodec(self._payloads, redis, queue.max_record_bytes)
        self._intake = Intake(self._codec, Unreadable(self._payloads, redis))
        self._loop = asyncio.get_running_loop()
        self._calls = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-kafka-call")
        self._admin: AdminClient | None = None
        self._publisher: Publisher | None = None
        self._counter: BacklogCounter | None = None
        self._pollers: tuple[PollThread, ...] = ()
        self._failure: Exception | None = None
        self._closed = False

    async def publish(self, record: Record) -> None:
        """Store on all in-sync replicas. Fails within the producer's delivery timeout."""
        data = await self._codec.encode(record)
        await self._send(self._topics.classes[record.priority_class.rank], data, record.num_tokens)

    async def pull(self, budget: Budget) -> list[Delivery]:
        """Take what fits from what the poll thread read."""
        if not self._pollers:
            await self._call(self._open_pollers, CALL_TIMEOUT_S)
        while not (deliveries := await self._intake.take(budget, self._bury)):
            await self._arrival()
        self._regulate()
        return deliveries

    async def complete(self, deliveries: Sequence[Delivery]) -> None:
        """Enter in the ledgers; the poll thread commits shortly after."""
        ours = self._intake.on_loan(deliveries)
        self._finish(self._intake.entries(ours))
        await self._codec.discard(delivery.record for delivery in ours)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Delivered again by this consumer, or by another once the partition moves."""
        self._intake.give_back(deliveries)

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Publish to the dead letters, then finish."""
        for entry in self._intake.entries(self._intake.on_loan([delivery])):
            await self._bury(entry, reason)

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The oldest ``limit`` that were not dropped."""
        return await self._call(lambda: self._dead_letters().read(limit), DEPTH_TIMEOUT_S)

    async def drop_dead_letters(self, ids: Collection[str]) -> int:
        """Committed as finished by a group of their own."""
        return await self._call(lambda: self._dead_letters().drop(ids), DEPTH_TIMEOUT_S)

    async def depth(self) -> dict[PriorityClass, Depth]:
        """Exact but for what other consumers finished within their commit interval; own work is committed first."""
        if self._pollers and self.healthy:
            async with _within(CALL_TIMEOUT_S):
                await asyncio.gather(*(asyncio.wrap_future(poller.flush()) for poller in self._pollers))
        return await self._call(lambda: self._open_counter().count(), DEPTH_TIMEOUT_S)

    async def ping(self) -> None:
        """Return when the broker answers."""
        await self._call(lambda: self._open_admin().list_topics(self._topics.dead, REQUEST_TIMEOUT_S), CALL_TIMEOUT_S)

    @property
    def healthy(self) -> bool:
        """False when a poll thread hangs: a call into the client that does not return cannot be ended."""
        return all(poller.healthy for poller in self._pollers)

    async def close(self) -> None:
        """Commit, leave the group, finish what is being published."""
        if self._closed:
            return
        self._closed = True
        await self._loop.run_in_executor(self._calls, self._close_all)
        self._calls.shutdown(wait=False)
        await self._payloads.aclose()

    def arrived(self, entries: list[Entry]) -> None:
        """From the poll thread: entries were read."""
        self._loop.call_soon_threadsafe(self._accept, entries)

    def revoked(self, partitions: set[tuple[str, int]]) -> None:
        """From the poll thread: other consumers have these partitions now."""
        self._loop.call_soon_threadsafe(self._intake.drop, lambda position: position[:2] not in partitions)

    def stopped(self, poller: PollThread, error: Exception | None) -> None:
        """From a poll thread: it ended."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._fail, poller, error)

    def _accept(self, entries: list[Entry]) -> None:
        self._intake.put(entries)
        self._regulate()

    def _fail(self, poller: PollThread, error: Exception | None) -> None:
        """One consumer is lost: begin anew with all."""
        if poller in self._pollers:
            self._failure = error
            pollers, self._pollers = self._pollers, ()
            self._calls.submit(_close, pollers)
            self._intake.drop(lambda position: False)
            self._intake.wake()

    def _regulate(self) -> None:
        """Pause the classes that are full here, resume those half empty."""
        for poller, held in zip(self._pollers, self._intake.held(), strict=bool(self._pollers)):
            limit = 0.5 if poller.full else 1.0
            poller.full = held.requests > BUFFER_REQUESTS * limit or held.tokens > BUFFER_TOKENS * limit

    async def _arrival(self) -> None:
        """Wait for the next entries; raises when a poll thread has died or hangs."""
        if self._failure is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STALL_S):
                    await self._intake.changed()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise QueueUnavailable(f"the Kafka consumer stopped: {failure!r}") from failure
        if not self.healthy:
            raise QueueUnavailable("a Kafka poll thread hangs")

    def _finish(self, entries: Sequence[Entry]) -> None:
        for poller in self._pollers:
            poller.finish(entry.position for entry in entries)
        self._intake.forget(entries)

    async def _bury(self, entry: Entry, reason: str) -> None:
        await self._send(self._topics.dead, entry.data, entry.tokens, reason)
        self._finish([entry])

    async def _send(self, topic: str, data: bytes, tokens: int, reason: str = "") -> None:
        headers = {TOKENS_HEADER: b"%d" % tokens} | ({REASON_HEADER: reason.encode()} if reason else {})
        if self._publisher is None:
            await self._call(self._open_publisher, CALL_TIMEOUT_S)
        assert self._publisher is not None
        await self._publisher.send(topic, data, headers)

    async def _call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Run a blocking call on the thread for them.

        There is one, so clients are opened once; it keeps what it opened also when its caller was cancelled.
        """
        async with _within(timeout_s):
            return await self._loop.run_in_executor(self._calls, function)

    def _open_admin(self) -> AdminClient:
        if self._admin is None:
            admin = open_client(AdminClient, self._settings)
            ensure_topics(admin, self._settings, self._topics)
            self._admin = admin
        return self._admin

    def _open_publisher(self) -> None:
        self._open_admin()
        if self._publisher is None:
            self._publisher = Publisher(self._settings)

    def _open_pollers(self) -> None:
        admin = self._open_admin()
        if not self._pollers:
            lease_s, ranks = session_s(admin), range(len(PriorityClass))
            pollers = tuple(PollThread(self._settings, self._topics, rank, lease_s, self) for rank in ranks)
            for poller in pollers:
                poller.start()
            try:
                for poller in pollers:
                    poller.connected.result()
            except BaseException:
                _close(pollers)
                raise
            self._pollers, self._failure = pollers, None

    def _open_counter(self) -> BacklogCounter:
        if self._counter is None:
            self._counter = BacklogCounter(self._settings, self._topics, self._open_admin())
        return self._counter

    def _close_all(self) -> None:
        _close(self._pollers)
        for part in (self._publisher, self._counter):
            if part is not None:
                part.close()
        self._counter = self._admin = None  # the library ends a client that nobody holds; later it would be too late

    def _dead_letters(self) -> DeadLetterTopic:
        return DeadLetterTopic(self._settings, self._topics, self._open_admin())


def _close(pollers: Sequence[PollThread]) -> None:
    """Side by side: each commits and leaves the group."""
    for poller in pollers:
        poller.stop()
    for poller in pollers:
        poller.join()


@contextlib.asynccontextmanager
async def _within(timeout_s: float) -> AsyncIterator[None]:
    """Raise :class:`QueueUnavailable` when the broker fails or takes longer."""
    with broker_errors():
        async with asyncio.timeout(timeout_s):
            yield
