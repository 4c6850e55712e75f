"""The dead letters of a pool on Kafka.

A topic can only forget its beginning. What an operator dropped in its middle is kept as the finished offsets of a
consumer group nobody joins, by the same ledger that requests are finished with. Brokers forget the offsets of such a
group after ``offsets.retention.minutes``, a week by default: letters dropped behind a kept one would show again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from confluent_kafka import Message, TopicPartition
from confluent_kafka.admin import AdminClient

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.kafka_client import REASON_HEADER, Partition, Topics, answers, broker_errors, header, place
from penstock.queue.kafka_depth import LogReader
from penstock.queue.ledger import Ledger, Range
from penstock.queue.settings import QueueSettings


class DeadLetterTopic:
    """Reads and drops dead letters. All methods block."""

    def __init__(self, settings: QueueSettings, topics: Topics, admin: AdminClient) -> None:
        self._settings = settings
        self._topic = topics.dead
        self._group = f"{topics.group}.dead"
        self._admin = admin

    def read(self, limit: int) -> list[DeadLetter]:
        """The oldest ``limit`` letters that were not dropped."""
        with self._reader() as reader:
            bounds = reader.bounds()
            ledgers = _ledgers(reader, bounds)
            ranges = {partition: (ledgers[partition].watermark, end) for partition, (_, end) in bounds.items()}
            found = [message for message in reader.read(ranges) if _kept(message, ledgers)]
        found.sort(key=lambda message: message.timestamp()[1])
        return [_letter(message) for message in found[:limit]]

    def drop(self, ids: Collection[str]) -> int:
        """Forget these letters; returns how many there were."""
        with self._reader() as reader:
            bounds = reader.bounds()
            ledgers = _ledgers(reader, bounds)
            dropped = 0
            for partition, ledger in ledgers.items():
                for offset in range(ledger.watermark, bounds[partition][1]):
                    if ledger.deliver(offset) and _id(partition, offset) in ids:
                        dropped += ledger.finish(offset)
            reader.commit(ledgers)
        self._cut(ledgers)
        return dropped

    def _reader(self) -> contextlib.closing[LogReader]:
        return contextlib.closing(LogReader(self._settings, (self._topic,), self._group, self._admin))

    def _cut(self, ledgers: dict[Partition, Ledger]) -> None:
        below = [TopicPartition(*partition, ledger.watermark) for partition, ledger in ledgers.items()]
        with broker_errors():
            answers(self._admin, lambda: self._admin.delete_records(below))


def _ledgers(reader: LogReader, bounds: dict[Partition, Range]) -> dict[Partition, Ledger]:
    committed = reader.finished()
    return {
        partition: Ledger(*committed[partition]) if committed[partition][0] >= start else Ledger(start)
        for partition, (start, _) in bounds.items()
    }


def _kept(message: Message, ledgers: dict[Partition, Ledger]) -> bool:
    partition, offset = place(message)
    return ledgers[partition].deliver(offset)


def _id(partition: Partition, offset: int) -> str:
    return f"{partition.number}-{offset}"


def _letter(message: Message) -> DeadLetter:
    return DeadLetter(
        id=_id(*place(message)),
        data=message.value() or b"",
        reason=header(message, REASON_HEADER).decode(),
        at_ms=message.timestamp()[1],
    )
