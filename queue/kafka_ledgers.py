"""The ledgers of the partitions that one consumer has, for use by several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from confluent_kafka import TopicPartition

from penstock.queue.intake import Entry, Position
from penstock.queue.kafka_client import Partition
from penstock.queue.ledger import Ledger


class Ledgers:
    """What was delivered of each partition, what of it is finished, and which changes no commit has saved yet.

    The poll thread opens, delivers and takes what is to be committed; any thread finishes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Partition, Ledger] = {}
        self._unsaved: set[Partition] = set()

    def __contains__(self, partition: Partition) -> bool:
        return partition in self._open

    @property
    def busy(self) -> bool:
        """Whether work is on loan, or something waits for a commit."""
        with self._lock:
            return bool(self._unsaved) or any(ledger.pending for ledger in self._open.values())

    def open(self, partition: Partition, ledger: Ledger) -> None:
        """Begin with what the broker has saved."""
        with self._lock:
            self._open[partition] = ledger

    def forget(self, partitions: set[Partition]) -> None:
        """They are another consumer's."""
        with self._lock:
            self._unsaved -= partitions
            for partition in partitions:
                self._open.pop(partition, None)

    def deliver(self, partition: Partition, entries: Sequence[Entry]) -> list[Entry]:
        """Note what was read; returns what was neither finished nor delivered before."""
        with self._lock:
            ledger = self._open[partition]
            return [entry for entry in entries if ledger.deliver(int(entry.position[2]))]

    def finish(self, positions: Iterable[Position]) -> None:
        """Note what is finished; partitions that are not ours any more are passed over."""
        with self._lock:
            for topic, number, offset in positions:
                partition = Partition(topic, number)
                if partition in self._open and self._open[partition].finish(int(offset)):
                    self._unsaved.add(partition)

    def unsaved(self, partitions: set[Partition]) -> list[TopicPartition]:
        """What a commit of these has to save; they stay unsaved."""
        with self._lock:
            return self._offsets(self._unsaved & partitions)

    def take_unsaved(self) -> list[TopicPartition]:
        """What a commit has to save, from now on taken for saved."""
        with self._lock:
            return self._take(self._unsaved)

    def take_all(self) -> list[TopicPartition]:
        """Every partition's watermark, from now on taken for saved."""
        with self._lock:
            return self._take(set(self._open))

    def save_again(self, offsets: Iterable[TopicPartition]) -> None:
        """A commit of these failed."""
        failed = partitions_of(offsets)
        with self._lock:
            self._unsaved |= failed & self._open.keys()

    def _take(self, partitions: set[Partition]) -> list[TopicPartition]:
        offsets = self._offsets(partitions)
        self._unsaved = set()
        return offsets

    def _offsets(self, partitions: set[Partition]) -> list[TopicPartition]:
        return [
            TopicPartition(*partition, ledger.watermark, metadata=ledger.metadata())
            for partition, ledger in self._open.items()
            if partition in partitions
        ]


def partitions_of(offsets: Iterable[TopicPartition]) -> set[Partition]:
    """Their partitions."""
    return {Partition(offset.topic, offset.partition) for offset in offsets}
