"""Requests the queue gave up on, kept with the reason for an operator to read."""

from __future__ import annotations

import msgspec

from penstock.queue.records import Record, decode_record


class DeadLetter(msgspec.Struct, frozen=True):
    """One record nobody will run. ``data`` are its bytes as they were on the broker; ``at_ms`` is wall-clock."""

    id: str
    data: bytes
    reason: str
    at_ms: int

    def record(self) -> Record:
        """The record, without a payload stored beside. Raises :class:`InvalidRecord` where that was the reason."""
        return decode_record(self.data)
