"""Counting the backlog of a pool from any process, without joining its consumers."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator

from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import (
    REQUEST_TIMEOUT_S,
    SETTLE_S,
    Partition,
    Topics,
    answers,
    broker_errors,
    open_client,
    place,
    settled,
    sound,
    take,
    tokens_of,
)
from penstock.queue.ledger import Ledger, Range, decode_finished
from penstock.queue.protocol import Depth
from penstock.queue.records import PriorityClass, now_ms
from penstock.queue.settings import QueueSettings

READ_TIMEOUT_S = 10.0
"""A first look at a long backlog reads all of it, 50 MB a second at worst; later ones read only what is new."""
POLL_TIMEOUT_S = 0.1
"""Only how often the deadline is looked at: a poll returns when records arrive."""
MAX_FETCH_BYTES = 1024 * 1024
READ_RECORDS = 1000


class LogReader:
    """Reads topics from an offset up to their present end, and what ``group`` has finished of them, without joining it.
    All methods block."""

    def __init__(self, queue: QueueSettings, topics: tuple[str, ...], group: str, admin: AdminClient) -> None:
        self._admin = admin
        self._consumer = open_client(
            Consumer,
            queue,
            {
                "group.id": group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "max.partition.fetch.bytes": MAX_FETCH_BYTES,
            },
        )
        with broker_errors():
            known = self._consumer.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        self.partitions = [Partition(topic, number) for topic in topics for number in sorted(known[topic].partitions)]

    def bounds(self) -> dict[Partition, Range]:
        """The first offset kept and the end of each partition."""
        first, end = self._offsets(OffsetSpec.earliest()), self._offsets(OffsetSpec.latest())
        return {partition: (first[partition], end[partition]) for partition in self.partitions}

    def finished(self) -> dict[Partition, tuple[int, str]]:
        """The offset the group has committed of each partition, negative for none, and its metadata."""
        asked = [TopicPartition(*partition) for partition in self.partitions]
        with broker_errors():
            found = settled(self._consumer, lambda: sound(self._consumer.committed(asked, SETTLE_S)))
        return {Partition(offset.topic, offset.partition): (offset.offset, offset.metadata or "") for offset in found}

    def commit(self, ledgers: dict[Partition, Ledger]) -> None:
        """Have the group, which must be without members, finish this. Raises :class:`QueueUnavailable`."""
        offsets = [TopicPartition(*p, ledger.watermark, metadata=ledger.metadata()) for p, ledger in ledgers.items()]
        with broker_errors():
            settled(self._consumer, lambda: sound(self._consumer.commit(offsets=offsets, asynchronous=False)))

    def read(self, ranges: dict[Partition, Range]) -> Iterator[Message]:
        """The records of each range. Raises :class:`QueueUnavailable` after :data:`READ_TIMEOUT_S`."""
        left = {partition: end for partition, (start, end) in ranges.items() if start < end}
        deadline = time.monotonic() + READ_TIMEOUT_S
        self._consumer.assign([TopicPartition(*partition, ranges[partition][0]) for partition in left])
        try:
            while left:
                if time.monotonic() > deadline:
                    raise QueueUnavailable(f"Kafka did not deliver the backlog within {READ_TIMEOUT_S:.0f} s")
                yield from self._next(left)
        finally:
            self._consumer.unassign()

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()

    def _next(self, left: dict[Partition, int]) -> Iterator[Message]:
        """The next records before their partition's end; a partition whose end was reached is dropped from ``left``."""
        with broker_errors():
            messages = take(self._consumer, READ_RECORDS, POLL_TIMEOUT_S)
        for message in messages:
            partition, offset = place(message)
            if offset < left.get(partition, 0):
                yield message
            if offset + 1 >= left.get(partition, 0):
                left.pop(partition, None)

    def _offsets(self, which: OffsetSpec) -> dict[Partition, int]:
        with broker_errors():
            found = answers(
                self._admin, lambda: self._admin.list_offsets({TopicPartition(*p): which for p in self.partitions})
            )
        return {Partition(p.topic, p.partition): result.offset for p, result in found.items()}


class _Partition:
    """Tokens and time of the records of one partition that may still be unfinished."""

    def __init__(self) -> None:
        self.read_to = 0
        self._records: dict[int, tuple[int, int]] = {}

    def add(self, message: Message) -> None:
        self._records[place(message)[1]] = (tokens_of(message), message.timestamp()[1])

    def unfinished(self, watermark: int, finished: list[Range]) -> list[tuple[int, int]]:
        """(tokens, timestamp) of what is not finished; what is below the watermark is forgotten."""
        self._records = {offset: row for offset, row in self._records.items() if offset >= watermark}
        starts = [start for start, _ in finished]
        return [
            row
            for offset, row in self._records.items()
            if not ((index := bisect_right(starts, offset)) and offset < finished[index - 1][1])
        ]


class BacklogCounter:
    """The exact backlog by class: what lies between the committed watermarks and the ends, less the finished offsets
    in the commit metadata. Commits trail by :data:`penstock.queue.kafka_consumer.COMMIT_INTERVAL_S`.

    Tokens are in a header and the time is the record's own; each record is read once and remembered while unfinished.
    """

    def __init__(self, queue: QueueSettings, topics: Topics, admin: AdminClient) -> None:
        self._topics = topics
        self._reader = LogReader(queue, topics.classes, topics.group, admin)
        self._cache = {partition: _Partition() for partition in self._reader.partitions}

    def count(self) -> dict[PriorityClass, Depth]:
        """Backlog by class. Blocks."""
        bounds = self._reader.bounds()  # before the commits, so that what ends in between is not counted
        committed = self._reader.finished()
        watermarks = {partition: max(bounds[partition][0], committed[partition][0]) for partition in bounds}
        self._catch_up(watermarks, {partition: end for partition, (_, end) in bounds.items()})
        rows: dict[str, list[tuple[int, int]]] = {topic: [] for topic in self._topics.classes}
        for partition, cache in self._cache.items():
            finished = list(decode_finished(*committed[partition]))
            rows[partition.topic] += cache.unfinished(watermarks[partition], finished)
        return {cls: _depth(rows[topic]) for cls, topic in zip(PriorityClass, self._topics.classes, strict=True)}

    def close(self) -> None:
        """Disconnect."""
        self._reader.close()

    def _catch_up(self, watermarks: dict[Partition, int], ends: dict[Partition, int]) -> None:
        ranges = {p: (max(cache.read_to, watermarks[p]), ends[p]) for p, cache in self._cache.items()}
        for message in self._reader.read(ranges):
            self._cache[place(message)[0]].add(message)
        for partition, (start, end) in ranges.items():
            self._cache[partition].read_to = max(start, end)


def _depth(rows: list[tuple[int, int]]) -> Depth:
    if not rows:
        return Depth(0, 0, 0.0)
    oldest = min(timestamp for _, timestamp in rows)
    return Depth(len(rows), sum(tokens for tokens, _ in rows), max(0, now_ms() - oldest) / 1000)
