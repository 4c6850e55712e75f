"""Counting the backlog of a pool from any process, without joining its consumers."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, OffsetAndMetadata, TopicPartition

from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import Topics, broker_errors, open_client, tokens_of
from penstock.queue.ledger import Range, decode_finished
from penstock.queue.protocol import Depth
from penstock.queue.records import PriorityClass, now_ms
from penstock.queue.settings import QueueSettings

READ_TIMEOUT_S = 10.0
"""A first look at a long backlog reads all of it, 50 MB a second at worst; later ones read only what is new."""
POLL_TIMEOUT_MS = 100
"""Only how often the deadline is looked at: a poll returns when records arrive."""
MAX_FETCH_BYTES = 1024 * 1024


class LogReader:
    """Reads topics from an offset up to their present end. Belongs to no group and commits nothing. Blocks.

    All partitions stay assigned, for the client forgets a topic that is not, and are paused but while read.
    """

    def __init__(self, queue: QueueSettings, topics: tuple[str, ...]) -> None:
        self._consumer = open_client(
            KafkaConsumer,
            queue,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=MAX_FETCH_BYTES,
            metrics_enabled=False,
        )
        with broker_errors():
            self.partitions = [
                TopicPartition(topic, number)
                for topic in topics
                for number in sorted(self._consumer.partitions_for_topic(topic))
            ]
            self._consumer.assign(self.partitions)
            self._consumer.pause(*self.partitions)

    def bounds(self) -> dict[TopicPartition, Range]:
        """The first offset kept and the end of each partition."""
        with broker_errors():
            first = self._consumer.beginning_offsets(self.partitions)
            end = self._consumer.end_offsets(self.partitions)
        return {partition: (first[partition], end[partition]) for partition in self.partitions}

    def read(self, ranges: dict[TopicPartition, Range]) -> Iterator[tuple[TopicPartition, Any]]:
        """The records of each range. Raises :class:`QueueUnavailable` after :data:`READ_TIMEOUT_S`."""
        ends = {partition: end for partition, (start, end) in ranges.items() if start < end}
        deadline = time.monotonic() + READ_TIMEOUT_S
        for partition in ends:
            self._consumer.seek(partition, ranges[partition][0])
        self._consumer.resume(*ends)
        try:
            while any(self._consumer.position(partition) < end for partition, end in ends.items()):
                if time.monotonic() > deadline:
                    raise QueueUnavailable(f"Kafka did not deliver the backlog within {READ_TIMEOUT_S:.0f} s")
                for partition, records in self._consumer.poll(timeout_ms=POLL_TIMEOUT_MS).items():
                    yield from ((partition, record) for record in records if record.offset < ends[partition])
        finally:
            self._consumer.pause(*ends)

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close(autocommit=False)


class _Partition:
    """Tokens and time of the records of one partition that may still be unfinished."""

    def __init__(self) -> None:
        self.read_to = 0
        self._records: dict[int, tuple[int, int]] = {}

    def add(self, record: Any) -> None:
        self._records[record.offset] = (tokens_of(record), record.timestamp)

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

    def __init__(self, queue: QueueSettings, topics: Topics, admin: KafkaAdminClient) -> None:
        self._topics = topics
        self._admin = admin
        self._reader = LogReader(queue, topics.classes)
        self._cache = {partition: _Partition() for partition in self._reader.partitions}

    def count(self) -> dict[PriorityClass, Depth]:
        """Backlog by class. Blocks."""
        bounds = self._reader.bounds()  # before the commits, so that what ends in between is not counted
        committed = self._committed()
        watermarks = {partition: max(bounds[partition][0], committed[partition].offset) for partition in bounds}
        self._catch_up(watermarks, {partition: end for partition, (_, end) in bounds.items()})
        rows: dict[str, list[tuple[int, int]]] = {topic: [] for topic in self._topics.classes}
        for partition, cache in self._cache.items():
            finished = list(decode_finished(committed[partition].offset, committed[partition].metadata or ""))
            rows[partition.topic] += cache.unfinished(watermarks[partition], finished)
        return {cls: _depth(rows[topic]) for cls, topic in zip(PriorityClass, self._topics.classes, strict=True)}

    def close(self) -> None:
        """Disconnect."""
        self._reader.close()

    def _committed(self) -> dict[TopicPartition, OffsetAndMetadata]:
        group = self._topics.group
        with broker_errors():
            offsets = self._admin.list_group_offsets({group: self._reader.partitions})
        return dict(offsets[group])

    def _catch_up(self, watermarks: dict[TopicPartition, int], ends: dict[TopicPartition, int]) -> None:
        ranges = {p: (max(cache.read_to, watermarks[p]), ends[p]) for p, cache in self._cache.items()}
        for partition, record in self._reader.read(ranges):
            self._cache[partition].add(record)
        for partition, (start, end) in ranges.items():
            self._cache[partition].read_to = max(start, end)


def _depth(rows: list[tuple[int, int]]) -> Depth:
    if not rows:
        return Depth(0, 0, 0.0)
    oldest = min(timestamp for _, timestamp in rows)
    return Depth(len(rows), sum(tokens for tokens, _ in rows), max(0, now_ms() - oldest) / 1000)
