"""The dead letters of a pool on Kafka.

A topic can only forget its beginning. What an operator dropped in its middle is kept as the finished offsets of a
consumer group nobody joins, by the same ledger that requests are finished with. Brokers forget the offsets of such a
group after ``offsets.retention.minutes``, a week by default: letters dropped behind a kept one would show again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from kafka import KafkaAdminClient, OffsetAndMetadata, TopicPartition
from kafka.errors import CoordinatorNotAvailableError, NoError

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import REASON_HEADER, Topics, broker_errors, header
from penstock.queue.kafka_depth import LogReader
from penstock.queue.ledger import Ledger, Range
from penstock.queue.settings import QueueSettings

COORDINATOR_TRIES = 20
COORDINATOR_PAUSE_S = 0.2
"""Four seconds in all: making the topic takes one, and an election after a broker's death a few."""

T = TypeVar("T")


class DeadLetterTopic:
    """Reads and drops dead letters. All methods block."""

    def __init__(self, settings: QueueSettings, topics: Topics, admin: KafkaAdminClient) -> None:
        self._settings = settings
        self._topic = topics.dead
        self._group = f"{topics.group}.dead"
        self._admin = admin

    def read(self, limit: int) -> list[DeadLetter]:
        """The oldest ``limit`` letters that were not dropped."""
        with contextlib.closing(LogReader(self._settings, (self._topic,))) as reader:
            bounds = reader.bounds()
            ledgers = self._ledgers(bounds)
            ranges = {partition: (ledgers[partition].watermark, end) for partition, (_, end) in bounds.items()}
            found = [row for row in reader.read(ranges) if ledgers[row[0]].deliver(row[1].offset)]
        found.sort(key=lambda row: row[1].timestamp)
        return [_letter(partition, record) for partition, record in found[:limit]]

    def drop(self, ids: Collection[str]) -> int:
        """Forget these letters; returns how many there were."""
        with contextlib.closing(LogReader(self._settings, (self._topic,))) as reader:
            bounds = reader.bounds()
        ledgers = self._ledgers(bounds)
        dropped = 0
        for partition, ledger in ledgers.items():
            for offset in range(ledger.watermark, bounds[partition][1]):
                if ledger.deliver(offset) and _id(partition, offset) in ids:
                    dropped += ledger.finish(offset)
        self._commit(ledgers)
        return dropped

    def _ledgers(self, bounds: dict[TopicPartition, Range]) -> dict[TopicPartition, Ledger]:
        offsets = _coordinated(lambda: self._admin.list_group_offsets({self._group: list(bounds)})[self._group])
        ledgers = {}
        for partition, (start, _) in bounds.items():
            committed = offsets.get(partition)
            known = committed is not None and committed.offset >= start
            ledgers[partition] = Ledger(committed.offset, committed.metadata or "") if known else Ledger(start)
        return ledgers

    def _commit(self, ledgers: dict[TopicPartition, Ledger]) -> None:
        offsets = {
            partition: OffsetAndMetadata(ledger.watermark, ledger.metadata(), -1)
            for partition, ledger in ledgers.items()
        }
        answers = _coordinated(lambda: self._admin.alter_group_offsets(self._group, offsets))
        with broker_errors():
            self._admin.delete_records({partition: ledger.watermark for partition, ledger in ledgers.items()})
        if failed := {error for error in answers.values() if error is not NoError}:
            raise QueueUnavailable(f"Kafka did not forget the dead letters: {failed}")


def _coordinated(call: Callable[[], T]) -> T:
    """The call's answer, once the group has a coordinator: a new broker first makes the topic for offsets."""
    with broker_errors():
        for _ in range(COORDINATOR_TRIES):
            try:
                return call()
            except CoordinatorNotAvailableError:
                time.sleep(COORDINATOR_PAUSE_S)
        return call()


def _id(partition: TopicPartition, offset: int) -> str:
    return f"{partition.partition}-{offset}"


def _letter(partition: TopicPartition, record: Any) -> DeadLetter:
    return DeadLetter(
        id=_id(partition, record.offset),
        data=record.value or b"",
        reason=header(record, REASON_HEADER).decode(),
        at_ms=record.timestamp,
    )
