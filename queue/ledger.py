"""Which offsets of a partition are finished, when they finish out of order.

Kafka stores one committed offset a partition and a short string beside it. The ledger commits the *watermark*, below
which everything is finished, and encodes the finished offsets above it into the string, as Confluent's parallel
consumer does. A consumer that takes the partition over skips those. What does not fit is left out from the end: such
offsets are delivered again, never lost. No I/O, no clock.
"""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from collections.abc import Iterable, Iterator

METADATA_LIMIT = 4096
"""Kafka's default ``offset.metadata.max.bytes``."""
_FORMAT = "1:"
_MAX_BYTES = (METADATA_LIMIT - len(_FORMAT)) // 4 * 3
"""Bytes that base64 turns into at most :data:`METADATA_LIMIT` characters."""

Range = tuple[int, int]
"""Offsets from the first up to, but not including, the second."""


class Ledger:
    """The delivered and the finished offsets of one partition, from ``watermark`` and ``metadata`` as committed.

    Offsets are delivered in ascending order and may leave gaps (compaction, transaction markers); a gap is nobody's
    work and counts as finished.
    """

    def __init__(self, watermark: int, metadata: str = "") -> None:
        self._next = watermark
        self._pending: OrderedDict[int, None] = OrderedDict()
        self._known = list(decode_finished(watermark, metadata))

    @property
    def watermark(self) -> int:
        """The offset to commit: everything below it is finished."""
        return next(iter(self._pending), self._next)

    @property
    def pending(self) -> int:
        """How many offsets were delivered and are not finished."""
        return len(self._pending)

    def deliver(self, offset: int) -> bool:
        """Note that ``offset`` was read; False when it was finished before and must not be handed out.

        An offset read a second time means that the log was cut back and written anew: what was known of it and later
        ones is void.
        """
        if offset < self._next:
            self._rewind(offset)
        self._next = offset + 1
        while self._known and self._known[0][1] <= offset:
            self._known.pop(0)
        if self._known and self._known[0][0] <= offset:
            return False
        self._pending[offset] = None
        return True

    def finish(self, offset: int) -> bool:
        """Note that ``offset`` is finished; False when it was not being worked on."""
        if offset not in self._pending:
            return False
        del self._pending[offset]
        return True

    def metadata(self) -> str:
        """The finished offsets above the watermark, at most :data:`METADATA_LIMIT` characters."""
        return encode_finished(self.watermark, self._finished())

    def _finished(self) -> Iterator[Range]:
        start = self.watermark
        for offset in self._pending:
            if offset > start:
                yield start, offset
            start = offset + 1
        if self._next > start:
            yield start, self._next
        yield from ((max(first, self._next), end) for first, end in self._known if end > self._next)

    def _rewind(self, offset: int) -> None:
        while self._pending and next(reversed(self._pending)) >= offset:
            self._pending.popitem()
        self._known.clear()


def encode_finished(watermark: int, ranges: Iterable[Range]) -> str:
    """Ascending ranges at or above ``watermark`` as a string: varints of the lengths of gap and range in turn.

    Ranges that would take it over :data:`METADATA_LIMIT` are left out from the end.
    """
    encoded = bytearray()
    cursor = watermark
    for start, end in ranges:
        pair = _varint(start - cursor) + _varint(end - start)
        if len(encoded) + len(pair) > _MAX_BYTES:
            break
        encoded += pair
        cursor = end
    return _FORMAT + base64.b64encode(encoded).decode() if encoded else ""


def decode_finished(watermark: int, metadata: str) -> Iterator[Range]:
    """The ranges in ``metadata``; nothing for a string this build does not know, which costs a second delivery."""
    if not metadata.startswith(_FORMAT):
        return
    try:
        encoded = base64.b64decode(metadata[len(_FORMAT) :], validate=True)
    except binascii.Error:
        return
    lengths = _varints(encoded)
    cursor = watermark
    for gap, length in zip(lengths, lengths, strict=False):
        yield cursor + gap, cursor + gap + length
        cursor += gap + length


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _varints(encoded: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in encoded:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number
            number = shift = 0
