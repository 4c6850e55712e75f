"""Requests the queue gave up on, kept with the reason for an operator to read, to run again or to drop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from penstock.queue.records import Record, decode_record

if TYPE_CHECKING:
    from penstock.queue.protocol import RequestQueue
    from penstock.queue.token_log import RequestLog


class DeadLetter(msgspec.Struct, frozen=True):
    """One record nobody will run. ``data`` are its bytes as they were on the broker; ``at_ms`` is wall-clock."""

    id: str
    data: bytes
    reason: str
    at_ms: int

    def record(self) -> Record:
        """The record, without a payload stored beside. Raises :class:`InvalidRecord` where that was the reason."""
        return decode_record(self.data)


async def retry(queue: RequestQueue, log: RequestLog, letters: Sequence[DeadLetter]) -> None:
    """Run these again from the beginning, without a deadline: theirs has passed.

    A letter is dropped when its request is on the queue again. If this process dies in between it is run twice under
    one id, which is harmless.

    Raises:
        InvalidRecord: one cannot be read; nothing was done.
        TransientError: broker or Redis are away; those published so far are not dropped yet.
    """
    records = [msgspec.structs.replace(letter.record(), deadline_ms=None) for letter in letters]
    await log.reset([record.id for record in records])
    for record in records:
        await queue.publish(record)
    await queue.drop_dead_letters([letter.id for letter in letters])
