"""Records too large for the broker: their heavy fields are stored beside it, in Redis, and referenced.

The claim-check pattern. Both backends encode and decode through one :class:`RecordCodec`, so a record looks the same
whichever broker carries it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import redis
import redis.asyncio

from penstock.queue.errors import InvalidRecord, PayloadTooLarge, QueueUnavailable
from penstock.queue.records import Record, decode_record, encode_record
from penstock.queue.redis_client import COMMAND_TIMEOUT_S, pooled
from penstock.queue.settings import RedisSettings

GRACE_S = 60
"""A finished record may be read again until its end is committed; by then its payload must still be there."""


class _Payload(msgspec.Struct, array_like=True):
    """The heavy fields of a record."""

    prompt: bytes
    body: bytes | None
    prefix_hashes: list[bytes]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Payload)


def connect_once(settings: RedisSettings) -> redis.asyncio.Redis:
    """A client that never repeats a command by itself: an append that timed out may have happened.

    It has no time-out of its own but for connecting: the library wraps each write in ``asyncio.wait_for``, which costs
    a task and, before Python 3.12, loses a cancellation that arrives with the result. Use :func:`answering`.
    """
    return pooled(settings, socket_timeout=None, retry=None, protocol=2)


@asynccontextmanager
async def answering(within_s: float = COMMAND_TIMEOUT_S) -> AsyncIterator[None]:
    """Raise :class:`QueueUnavailable` for whatever means that Redis did not answer in time or did not accept."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except (redis.RedisError, OSError) as error:
        raise QueueUnavailable(f"Redis did not accept: {error!r}") from error


class RecordCodec:
    """Encodes records for the broker and decodes them, moving heavy fields out and in.

    A stored payload lives for ``RedisSettings.lifetime_s``, as long as the state of an unfinished request does.
    """

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, max_record_bytes: int) -> None:
        self._client = client
        self._prefix = f"{settings.namespace}payload:"
        self._lifetime_s = settings.lifetime_s
        self._max_bytes = max_record_bytes

    async def encode(self, record: Record) -> bytes:
        """The record's bytes, at most ``max_record_bytes`` of them.

        Raises:
            PayloadTooLarge: too many bytes even without its heavy fields.
            QueueUnavailable: the payload could not be stored.
        """
        data = encode_record(record)
        return data if len(data) <= self._max_bytes else await self._detach(record)

    async def decode(self, data: bytes) -> Record:
        """The whole record.

        Raises:
            InvalidRecord: the bytes are not a record, or its payload is gone or unreadable.
            QueueUnavailable: the payload could not be asked for.
        """
        record = decode_record(data)
        return record if record.payload_ref is None else await self._attach(record, record.payload_ref)

    async def discard(self, records: Iterable[Record]) -> None:
        """Forget the payloads of finished records, after :data:`GRACE_S`."""
        keys = [record.payload_ref for record in records if record.payload_ref is not None]
        if not keys:
            return
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.expire(key, GRACE_S)
        async with answering():
            await pipeline.execute()

    async def _detach(self, record: Record) -> bytes:
        key = self._prefix + record.id
        data = encode_record(msgspec.structs.replace(record, prompt=b"", body=None, prefix_hashes=[], payload_ref=key))
        if len(data) > self._max_bytes:
            raise PayloadTooLarge(f"record has {len(data)} bytes without prompt and body; limit {self._max_bytes}")
        payload = _encoder.encode(_Payload(record.prompt, record.body, record.prefix_hashes))
        async with answering():
            await self._client.set(key, payload, ex=self._lifetime_s)
        return data

    async def _attach(self, record: Record, key: str) -> Record:
        async with answering():
            stored: Any = await self._client.get(key)
        if stored is None:
            raise InvalidRecord(f"payload {key} of the record is gone")
        try:
            payload = _decoder.decode(stored)
        except msgspec.MsgspecError as error:
            raise InvalidRecord(f"payload {key} of the record cannot be read: {error}") from error
        return msgspec.structs.replace(
            record, prompt=payload.prompt, body=payload.body, prefix_hashes=payload.prefix_hashes
        )
