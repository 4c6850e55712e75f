"""Where stored requests are kept: Redis, for as long as their answers can be asked for.

``{ns}http:{stream}`` holds the request, ``{ns}http-id:{tenant}:{name}`` leads to it from the ids a client has seen, and
``{ns}idem:{tenant}:{hash}`` from its idempotency key. All live as long as an unfinished request may; the end of the
answer shortens the first one's life to the retention, and without it the others mean nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Awaitable
from typing import cast

import msgspec
import redis.asyncio

from penstock.queue.redis_client import store_errors
from penstock.queue.scripts import script
from penstock.queue.settings import RedisSettings
from penstock.serving.errors import IdempotencyKeyReused, NotFound
from penstock.serving.request import ClientRequest

COMPRESS_BYTES = 4096
"""Prompts are text and shrink to a third; below this size the time is not worth the space."""
THREAD_BYTES = 256 * 1024
"""Compressing more than this takes over 3 ms, which other streams must not wait for."""
_PLAIN, _DEFLATED = b"\x00", b"\x01"
_PREFIXES = ("chatcmpl-", "cmpl-", "msg_")
"""What vLLM puts before the request's external id to make the id of an answer."""
RESPONSE_PREFIX = "resp_"
"""Before the stream id: the id of a response."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ClientRequest)


class RequestStore:
    """Save, find, and claim idempotency keys."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._ns = settings.namespace
        self._lifetime_ms = settings.lifetime_s * 1000
        self._retention_s = settings.retention_s
        self._claim = client.register_script(script("claim"))
        self._release = script("release")

    async def save(self, stored: ClientRequest) -> None:
        """Keep it under its stream id. Raises :class:`StoreUnavailable`."""
        await self._put(stored, "", "")

    async def claim(self, stored: ClientRequest, key: str, digest: str) -> ClientRequest | None:
        """Keep it, unless the tenant has used ``key`` before: then the request that was kept first.

        Raises:
            IdempotencyKeyReused: that one was another request.
            StoreUnavailable: Redis did not answer.
        """
        while True:
            taken = await self._put(stored, _key(stored.tenant, key), digest)
            if not taken:
                return None
            stream_id, known = (part.decode() for part in taken)
            if known != digest:
                raise IdempotencyKeyReused("This Idempotency-Key was used with another request; keys are for one only.")
            if (first := await self.load(stream_id)) is not None:
                return first

    async def release(self, stored: ClientRequest, key: str | None, *, ended: bool = False) -> bool:
        """Forget it where nothing was accepted, so that the next request with this key is the first; returns whether it
        did. Not while others count on it (``release.lua``), unless it ``ended`` with an error for all of them."""
        hashed = "" if key is None else _key(stored.tenant, key)
        names: list[str | int] = [stored.stream_id, hashed, _index(stored), int(ended), *stored.record_ids]
        with store_errors():
            # its text each time, and not its hash, which the server may not know yet: the key is free in one round trip
            return bool(await cast("Awaitable[int]", self._client.eval(self._release, 0, self._ns, *names)))

    async def load(self, stream_id: str) -> ClientRequest | None:
        """The request of a stream, or None."""
        with store_errors():
            data = cast("bytes | None", await self._client.get(f"{self._ns}http:{stream_id}"))
        return None if data is None else _unpack(data)

    async def find(self, tenant: str, name: str) -> ClientRequest:
        """The tenant's request by its stream id, its ``x-request-id``, or the id in its answer.

        Raises:
            NotFound: there is none, or no more.
        """
        stored = await self.load(name.removeprefix(RESPONSE_PREFIX)) or await self._by_external_id(tenant, name)
        if stored is None or stored.tenant != tenant:
            raise NotFound(f"No stream {name!r}: unknown, or expired ({self._retention_s} s after its end).")
        return stored

    async def delete(self, stored: ClientRequest) -> None:
        """Forget the request and its tokens."""
        keys = [f"{self._ns}http:{stored.stream_id}", *(f"{self._ns}tok:{id_}" for id_ in stored.record_ids)]
        with store_errors():
            await self._client.delete(*keys)

    async def _by_external_id(self, tenant: str, name: str) -> ClientRequest | None:
        names = [name, *(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))]
        with store_errors():
            keys = [f"{self._ns}http-id:{tenant}:{each}" for each in names]
            found = cast("list[bytes | None]", await self._client.mget(keys))
        stream_id = next((each for each in found if each is not None), None)
        return None if stream_id is None else await self.load(stream_id.decode())

    async def _put(self, stored: ClientRequest, key: str, digest: str) -> list[bytes]:
        data = await (asyncio.to_thread(_pack, stored) if len(stored.body) > THREAD_BYTES else _packed(stored))
        args = (self._ns, self._lifetime_ms, stored.stream_id, data, key, digest, _index(stored))
        with store_errors():
            return cast("list[bytes]", await self._claim(args=args))


def _index(stored: ClientRequest) -> str:
    return f"{stored.tenant}:{stored.external_id}"


def _key(tenant: str, key: str) -> str:
    return f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}"


async def _packed(stored: ClientRequest) -> bytes:
    return _pack(stored)


def _pack(stored: ClientRequest) -> bytes:
    data = _encoder.encode(stored)
    return _PLAIN + data if len(data) < COMPRESS_BYTES else _DEFLATED + zlib.compress(data, 1)


def _unpack(data: bytes) -> ClientRequest:
    return _decoder.decode(data[1:] if data[:1] == _PLAIN else zlib.decompress(data[1:]))
