"""The thread that owns the Kafka consumer of one class: polls, keeps the ledgers, commits.

Whoever polls too rarely loses its partitions. So nothing waits here for the event loop: entries go out by
``call_soon_threadsafe``, finished offsets come in through the ledgers, and a class whose entries pile up
is paused while polling goes on.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from penstock.queue.errors import QueueUnavailable
from penstock.queue.intake import Entry, Position
from penstock.queue.kafka_client import REQUEST_TIMEOUT_S, Partition, Topics, open_client, place, sound, take, tokens_of
from penstock.queue.kafka_ledgers import Ledgers, partitions_of
from penstock.queue.ledger import Ledger
from penstock.queue.settings import QueueSettings

BUSY_POLL_S = 0.1
"""A poll returns at once when records arrive. With work on loan this bounds how late a commit or a resumed class is
noticed."""
IDLE_POLL_S = 0.5
"""Without work on loan there is nothing to notice: few wake-ups keep an idle consumer under 1 % of a core."""
FETCH_WAIT_MS = 500
"""How long the broker holds an empty fetch. A resumed class waits for the next fetch, so its buffer holds more than
is used up meanwhile."""
COMMIT_INTERVAL_S = 0.1
"""What is finished is committed this often: bounds what a crash delivers again, at ten small requests a second."""
HEARTBEATS = 4
"""In a session, so that three late ones cost nothing."""
MAX_POLL_INTERVAL_MS = 30_000
"""The thread never waits for work to finish, so half a minute without a poll is a hang: others take over."""
STALL_S = 15.0
"""A poll takes at most a second, and a rebalance or a broker's restart a few; after this the thread counts as hung."""
MAX_FETCH_BYTES = 1024 * 1024
"""Per partition; at least the broker's own limit of a record."""
POLL_RECORDS = 500
PREFETCH_RECORDS = 2000
"""What the library reads ahead of the poll: a few polls' worth, for what waits there no other consumer can have."""
PREFETCH_KB = 16 * 1024
BACKOFF_MS = 20
"""Before it fetches again after an error, or when it has read ahead enough. The library's 0.5 and 1 s are stalls."""


class Sink(Protocol):
    """Where the thread leaves what it has for the event loop. Called on the poll thread."""

    def arrived(self, entries: list[Entry]) -> None:
        """Entries were read."""

    def revoked(self, partitions: set[tuple[str, int]]) -> None:
        """These partitions are another consumer's now."""

    def stopped(self, poller: PollThread, error: Exception | None) -> None:
        """The thread ended."""


class PollThread:
    """One consumer of the pool's group, for one class.

    A consumer for each class, because the library's cooperative assignor counts partitions and does not look at their
    topics: of two processes one could have all of a class, and the other, with as much room for it, nothing.
    ``session_s``: after this time without a heartbeat the brokers give its partitions to others.
    """

    def __init__(self, queue: QueueSettings, topics: Topics, rank: int, session_s: float, sink: Sink) -> None:
        self._settings = queue
        self._session_ms = int(session_s * 1000)
        self._group = topics.group
        self._topic = topics.classes[rank]
        self._rank = rank
        self._sink = sink
        self._ledgers = Ledgers()
        self._paused: set[Partition] = set()
        self._flushes: deque[Future[None]] = deque()  # filled by any thread
        self._committed_at = 0.0
        self._polled_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"penstock-kafka-poll-{rank}", daemon=True)
        self._consumer: Consumer
        self.connected: Future[None] = Future()
        self.full = False
        """Whether to read no more for now; set by the event loop."""

    def start(self) -> None:
        """Start polling; :attr:`connected` tells when the broker was reached."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread polls. It can hang inside the client; then the process should end."""
        return self._thread.is_alive() and time.monotonic() - self._polled_at < STALL_S

    def finish(self, positions: Iterable[Position]) -> None:
        """Note finished records; committed within :data:`COMMIT_INTERVAL_S`. From any thread."""
        self._ledgers.finish(positions)

    def flush(self) -> Future[None]:
        """Commit all that is finished; done when the broker has it. From any thread."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # the thread answers it even when nobody waits any more
        self._flushes.append(done)
        return done

    def stop(self) -> None:
        """Commit, leave the group and end; :meth:`join` waits for it."""
        self._stop.set()

    def join(self) -> None:
        """Return when the thread has ended."""
        self._thread.join()

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
        self._sink.stopped(self, failure)
        self._answer_flushes(QueueUnavailable("the consumer was closed"))
        self._consumer.close()

    def _connect(self) -> None:
        self._consumer = open_client(
            Consumer,
            self._settings,
            {
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "cooperative-sticky",
                "fetch.min.bytes": 1,
                "fetch.wait.max.ms": FETCH_WAIT_MS,
                "fetch.error.backoff.ms": BACKOFF_MS,
                "fetch.queue.backoff.ms": BACKOFF_MS,
                "max.partition.fetch.bytes": MAX_FETCH_BYTES,
                "queued.min.messages": PREFETCH_RECORDS,
                "queued.max.messages.kbytes": PREFETCH_KB,
                "session.timeout.ms": self._session_ms,
                "heartbeat.interval.ms": self._session_ms // HEARTBEATS,
                "max.poll.interval.ms": MAX_POLL_INTERVAL_MS,
                "on_commit": self._committed,
            },
        )
        self._consumer.subscribe([self._topic], on_assign=self._gained, on_revoke=self._revoked, on_lost=self._lost)

    # -- the group's changes; called by the library within a poll

    def _gained(self, _: Consumer, gained: list[TopicPartition]) -> None:
        """Whatever was known of them is old; a ledger is opened with a partition's first records."""
        self._ledgers.forget(partitions_of(gained))

    def _revoked(self, _: Consumer, revoked: list[TopicPartition]) -> None:
        """Commit while the partitions are still ours, then forget them."""
        partitions = partitions_of(revoked)
        if offsets := self._ledgers.unsaved(partitions):
            self._consumer.commit(offsets=offsets, asynchronous=True)
        self._give_up(partitions)

    def _lost(self, _: Consumer, lost: list[TopicPartition]) -> None:
        """The group went on without us: somebody else commits for these now."""
        self._give_up(partitions_of(lost))

    def _give_up(self, partitions: set[Partition]) -> None:
        self._ledgers.forget(partitions)
        self._paused -= partitions
        self._sink.revoked({(partition.topic, partition.number) for partition in partitions})

    # -- polling

    def _poll(self) -> None:
        batches: defaultdict[Partition, list[Message]] = defaultdict(list)
        for message in take(self._consumer, POLL_RECORDS, BUSY_POLL_S if self._ledgers.busy else IDLE_POLL_S):
            batches[place(message)[0]].append(message)
        self._polled_at = time.monotonic()
        assigned = partitions_of(self._consumer.assignment())
        for partition in batches.keys() & assigned:  # one may have been revoked while the batch was being taken
            self._hand_out(partition, batches[partition])
        self._commit_if_due()
        self._apply_pauses(assigned)

    def _hand_out(self, partition: Partition, messages: list[Message]) -> None:
        entries = [self._entry(message) for message in messages]
        if partition not in self._ledgers:
            self._ledgers.open(partition, self._saved_ledger(partition, int(entries[0].position[2])))
        if fresh := self._ledgers.deliver(partition, entries):
            self._sink.arrived(fresh)

    def _saved_ledger(self, partition: Partition, first_offset: int) -> Ledger:
        (committed,) = sound(self._consumer.committed([TopicPartition(*partition)], REQUEST_TIMEOUT_S))
        if committed.offset < 0:
            return Ledger(first_offset)
        return Ledger(committed.offset, committed.metadata or "")

    def _entry(self, message: Message) -> Entry:
        (topic, number), offset = place(message)
        return Entry(
            order=(self._rank, message.timestamp()[1], number, offset),
            tokens=tokens_of(message),
            data=message.value() or b"",
            position=(topic, number, str(offset)),
        )

    # -- committing

    def _commit_if_due(self) -> None:
        now = time.monotonic()
        if self._flushes:
            self._commit_all()
        elif now - self._committed_at >= COMMIT_INTERVAL_S and (offsets := self._ledgers.take_unsaved()):
            self._committed_at = now
            self._consumer.commit(offsets=offsets, asynchronous=True)

    def _commit_all(self) -> None:
        """Commit every partition and wait for the broker."""
        waiting = len(self._flushes)  # what is finished when one comes later may not be among these offsets
        offsets = self._ledgers.take_all()
        try:
            if offsets:
                sound(self._consumer.commit(offsets=offsets, asynchronous=False))
            self._answer_flushes(None, waiting)
        except KafkaException as error:
            self._ledgers.save_again(offsets)
            self._answer_flushes(QueueUnavailable(f"Kafka did not commit: {error}"), waiting)

    def _committed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """Called by the library within a poll: what was not committed is tried again with the next commit."""
        self._ledgers.save_again(offset for offset in offsets if error is not None or offset.error is not None)

    def _answer_flushes(self, failure: QueueUnavailable | None, most: int | None = None) -> None:
        for _ in range(len(self._flushes) if most is None else most):
            done = self._flushes.popleft()
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    def _apply_pauses(self, assigned: set[Partition]) -> None:
        full = assigned if self.full else set()
        if pause := [TopicPartition(*partition) for partition in full - self._paused]:
            self._consumer.pause(pause)
        if resume := [TopicPartition(*partition) for partition in self._paused - full]:
            self._consumer.resume(resume)
        self._paused = full
