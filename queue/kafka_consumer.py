"""The thread that owns the Kafka consumer: polls, keeps the ledgers, commits.

The client must be polled by one thread, always, or the group takes the partitions away. So nothing waits here for the
event loop: entries go out by ``call_soon_threadsafe``, finished offsets come in through the ledgers under a lock, and
a class whose entries pile up is paused while polling goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Protocol

from kafka import ConsumerRebalanceListener, KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError

from penstock.queue.errors import QueueUnavailable
from penstock.queue.intake import Entry, Position
from penstock.queue.kafka_client import REQUEST_TIMEOUT_MS, Topics, open_client, tokens_of
from penstock.queue.ledger import Ledger
from penstock.queue.settings import QueueSettings

BUSY_POLL_MS = 100
"""A poll returns at once when records arrive. With work on loan this bounds how late a commit or a resumed class is
noticed."""
IDLE_POLL_MS = 500
"""Without work on loan there is nothing to notice: few wake-ups keep an idle consumer under 1 % of a core."""
FETCH_WAIT_MS = 500
"""How long the broker holds an empty fetch. A resumed class waits for the next fetch, so its buffer holds more than
is used up meanwhile."""
COMMIT_INTERVAL_S = 0.1
"""What is finished is committed this often: bounds what a crash delivers again, at ten small requests a second."""
SESSION_TIMEOUT_MS = 6000
"""The smallest the broker allows by default: a dead consumer's partitions move on after this."""
HEARTBEAT_MS = 1500
"""A quarter of the session, so that three late heartbeats cost nothing."""
MAX_POLL_INTERVAL_MS = 30_000
"""The thread never waits for work to finish, so half a minute without a poll is a hang: others take over."""
STALL_S = 15.0
"""A poll takes at most a second, and a rebalance or a broker's restart a few; after this the thread counts as hung."""
MAX_FETCH_BYTES = 1024 * 1024
"""Per partition; at least the broker's own limit of a record."""
POLL_RECORDS = 500


class Sink(Protocol):
    """Where the thread leaves what it has for the event loop. Called on the poll thread."""

    def arrived(self, entries: list[Entry]) -> None:
        """Entries were read."""

    def revoked(self, partitions: set[tuple[str, int]]) -> None:
        """These partitions are another consumer's now."""

    def stopped(self, error: Exception | None) -> None:
        """The thread ended."""


class PollThread(ConsumerRebalanceListener):  # type: ignore[misc]  # the library has no types
    """One consumer of the pool's group."""

    def __init__(self, queue: QueueSettings, topics: Topics, sink: Sink) -> None:
        self._settings = queue
        self._topics = topics
        self._sink = sink
        self._ranks = {topic: rank for rank, topic in enumerate(topics.classes)}
        self._lock = threading.Lock()
        self._ledgers: dict[TopicPartition, Ledger] = {}
        self._dirty: set[TopicPartition] = set()
        self._flushes: list[Future[None]] = []
        self._committed_at = 0.0
        self._polled_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-kafka-poll", daemon=True)
        self._consumer: KafkaConsumer
        self.connected: Future[None] = Future()
        self.full_ranks: frozenset[int] = frozenset()
        """Classes to read no more of for now; set by the event loop."""

    def start(self) -> None:
        """Start polling; :attr:`connected` tells when the broker was reached."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread polls. It can hang inside the client; then the process should end."""
        return self._thread.is_alive() and time.monotonic() - self._polled_at < STALL_S

    def finish(self, positions: Iterable[Position]) -> None:
        """Note finished records; committed within :data:`COMMIT_INTERVAL_S`. From any thread."""
        with self._lock:
            for topic, number, offset in positions:
                partition = TopicPartition(topic, number)
                if partition in self._ledgers and self._ledgers[partition].finish(int(offset)):
                    self._dirty.add(partition)

    def flush(self) -> Future[None]:
        """Commit all that is finished; done when the broker has it. From any thread."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # the thread answers it even when nobody waits any more
        with self._lock:
            self._flushes.append(done)
        return done

    def close(self) -> None:
        """Commit, leave the group and end. Blocks."""
        self._stop.set()
        self._thread.join()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Whatever was known of them is old; a ledger is opened with a partition's first records."""
        with self._lock:
            self._forget(set(assigned))

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Commit while the partitions are still ours, then forget them. Called on the client's own I/O thread."""
        partitions = set(revoked)
        with self._lock:
            offsets = self._offsets(self._dirty & partitions)
            self._forget(partitions)
        if offsets:
            self._consumer.commit_async(offsets)
        self._sink.revoked({(partition.topic, partition.partition) for partition in partitions})

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """The group went on without us: somebody else commits for these now."""
        partitions = set(lost)
        with self._lock:
            self._forget(partitions)
        self._sink.revoked({(partition.topic, partition.partition) for partition in partitions})

    def _run(self) -> None:
        try:
            self._connect()
        except Exception as error:
            self.connected.set_exception(error)
            return
        self.connected.set_result(None)
        failure: Exception | None = None
        try:
            while not self._stop.is_set():
                self._poll()
            self._commit_all()
        except Exception as error:
            failure = error
        self._sink.stopped(failure)
        _answer(self._flushes, QueueUnavailable("the consumer was closed"))
        self._consumer.close(autocommit=False, timeout_ms=REQUEST_TIMEOUT_MS)

    def _connect(self) -> None:
        self._consumer = open_client(
            KafkaConsumer,
            self._settings,
            group_id=self._topics.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy=[CooperativeStickyAssignor],
            fetch_min_bytes=1,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=MAX_FETCH_BYTES,
            max_poll_records=POLL_RECORDS,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
            metrics_enabled=False,
        )
        self._consumer.subscribe(self._topics.classes, listener=self)

    def _poll(self) -> None:
        with self._lock:
            busy = bool(self._dirty) or any(ledger.pending for ledger in self._ledgers.values())
        batches = self._consumer.poll(timeout_ms=BUSY_POLL_MS if busy else IDLE_POLL_MS)
        self._polled_at = time.monotonic()
        for partition, records in batches.items():
            self._hand_out(partition, records)
        self._commit_if_due()
        self._apply_pauses()

    def _hand_out(self, partition: TopicPartition, records: list[Any]) -> None:
        if partition not in self._consumer.assignment():  # revoked while the batch was on its way
            return
        ledger = self._ledgers.get(partition) or self._open_ledger(partition, records[0].offset)
        with self._lock:
            self._ledgers[partition] = ledger
            fresh = [self._entry(record) for record in records if ledger.deliver(record.offset)]
        if fresh:
            self._sink.arrived(fresh)

    def _open_ledger(self, partition: TopicPartition, first_offset: int) -> Ledger:
        committed = self._consumer.committed(partition, metadata=True, timeout_ms=REQUEST_TIMEOUT_MS)
        if committed is None or committed.offset < 0:
            return Ledger(first_offset)
        return Ledger(committed.offset, committed.metadata or "")

    def _entry(self, record: Any) -> Entry:
        return Entry(
            order=(self._ranks[record.topic], record.timestamp, record.partition, record.offset),
            tokens=tokens_of(record),
            data=record.value or b"",
            position=(record.topic, record.partition, str(record.offset)),
        )

    def _commit_if_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            flushing = bool(self._flushes)
            due = bool(self._dirty) and now - self._committed_at >= COMMIT_INTERVAL_S
            offsets = {} if flushing or not due else self._take_dirty()
        if flushing:
            self._commit_all()
        elif due:
            self._committed_at = now
            self._consumer.commit_async(offsets, callback=self._commit_done)

    def _commit_all(self) -> None:
        """Commit every partition and wait for the broker."""
        with self._lock:
            self._dirty |= self._ledgers.keys()
            offsets = self._take_dirty()
            flushes, self._flushes = self._flushes, []
        try:
            self._consumer.commit(offsets, timeout_ms=REQUEST_TIMEOUT_MS)
            _answer(flushes, None)
        except KafkaError as error:
            self._commit_done(offsets, error)
            _answer(flushes, QueueUnavailable(f"Kafka did not commit: {error!r}"))

    def _take_dirty(self) -> dict[TopicPartition, OffsetAndMetadata]:
        offsets = self._offsets(self._dirty)
        self._dirty.clear()
        return offsets

    def _commit_done(self, offsets: dict[TopicPartition, OffsetAndMetadata], result: Any) -> None:
        if isinstance(result, Exception):  # try again with the next one
            with self._lock:
                self._dirty |= offsets.keys() & self._ledgers.keys()

    def _apply_pauses(self) -> None:
        assigned = self._consumer.assignment()
        full = {partition for partition in assigned if self._ranks[partition.topic] in self.full_ranks}
        paused = self._consumer.paused()
        if full - paused:
            self._consumer.pause(*(full - paused))
        if paused - full:
            self._consumer.resume(*(paused - full))

    def _offsets(self, partitions: set[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        ledgers = {partition: self._ledgers[partition] for partition in partitions & self._ledgers.keys()}
        return {
            partition: OffsetAndMetadata(ledger.watermark, ledger.metadata(), -1)
            for partition, ledger in ledgers.items()
        }

    def _forget(self, partitions: set[TopicPartition]) -> None:
        self._dirty -= partitions
        for partition in partitions:
            self._ledgers.pop(partition, None)


def _answer(flushes: list[Future[None]], failure: QueueUnavailable | None) -> None:
    for done in flushes:
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)
