"""API keys: who is calling.

A key is 32 random bytes, shown once. Redis holds its SHA-256 only, in the hash ``{ns}keys`` (digest ->
who); a fast hash is right for a secret that cannot be guessed. An ingress remembers an answer for
:data:`CACHE_TTL_S`, which is how long a revoked key still works.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple, cast

import msgspec
import redis.asyncio

from penstock.queue.errors import RequestError
from penstock.queue.records import now_ms
from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings
from penstock.serving.errors import Unauthorized, UnsafeBinding

KEY_PREFIX = "sk-ps-"
KEY_BYTES = 32
CACHE_TTL_S = 1.0
"""A revocation is felt within a second, and a busy key costs Redis one read a second and ingress."""
MAX_CACHED = 10_000
"""Answers remembered at once: a flood of made-up keys must not fill the memory."""
DEFAULT_TENANT = "default"
"""Everybody, as long as no key exists."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class KeyInfo(msgspec.Struct, frozen=True):
    """Whom a key belongs to. ``created`` is wall-clock milliseconds since the epoch."""

    id: str
    tenant: str
    label: str = ""
    created: int = 0


class Lookup(NamedTuple):
    """Answer to "whose key is this": its owner or None, and whether any key exists at all."""

    owner: KeyInfo | None
    any_keys: bool


ANYBODY = KeyInfo(id="open", tenant=DEFAULT_TENANT)
"""The caller in open mode."""

_decoder = msgspec.msgpack.Decoder(KeyInfo)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class KeyStore:
    """The keys in Redis. Every method raises :class:`~penstock.queue.errors.StoreUnavailable` when it is
    away.
    """

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._hash = f"{settings.namespace}keys"

    async def create(self, tenant: str, label: str = "") -> tuple[str, KeyInfo]:
        """Make a key; returns it (the only time it can be read) and its description.

        Raises:
            RequestError: the tenant's name is not 1-63 letters, digits, dots, dashes and underscores.
        """
        if not _NAME.fullmatch(tenant):
            raise RequestError(f"tenant {tenant!r}: use 1-63 letters, digits, '.', '_', '-', first a letter or digit")
        key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        info = KeyInfo(f"key-{secrets.token_hex(6)}", tenant, label, now_ms())
        with store_errors():
            await self._client.hset(self._hash, _digest(key), msgspec.msgpack.encode(info))
        return key, info

    async def entries(self) -> list[KeyInfo]:
        """All keys, oldest first."""
        return sorted((await self._all()).values(), key=lambda info: (info.created, info.id))

    async def revoke(self, key_id: str) -> bool:
        """End a key by its id; False when there is none."""
        digests = [digest for digest, info in (await self._all()).items() if info.id == key_id]
        if not digests:
            return False
        with store_errors():
            return bool(await self._client.hdel(self._hash, *digests))

    async def lookup(self, key: str) -> Lookup:
        """Whose key this is, in one round trip."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hget(self._hash, _digest(key))
        pipeline.hlen(self._hash)
        with store_errors():
            value, count = await pipeline.execute()
        return Lookup(_decoder.decode(value) if value else None, bool(count))

    async def has_keys(self) -> bool:
        """Whether there are keys at all."""
        with store_errors():
            return bool(await self._client.hlen(self._hash))

    async def _all(self) -> dict[bytes, KeyInfo]:
        with store_errors():
            entries = cast(dict[bytes, bytes], await self._client.hgetall(self._hash))
        return {digest: _decoder.decode(value) for digest, value in entries.items()}


class Authenticator:
    """Answers the ingress' question for every request, from memory most of the time.

    ``open_mode``: let everybody in as :data:`DEFAULT_TENANT` as long as no key exists; for loopback only.
    """

    def __init__(self, store: KeyStore, *, open_mode: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._open_mode = open_mode
        self._clock = clock
        self._known: dict[bytes, tuple[float, Lookup]] = {}

    async def authenticate(self, key: str | None) -> KeyInfo:
        """The caller.

        Raises:
            Unauthorized: the key is missing, unknown or revoked.
            StoreUnavailable: it is not in memory and Redis is away.
        """
        found = await self._lookup(key or "")
        if found.owner is not None:
            return found.owner
        if self._open_mode and not found.any_keys:
            return ANYBODY
        raise Unauthorized(
            "Incorrect API key provided." if key else "No API key provided: send 'Authorization: Bearer <key>'."
        )

    async def _lookup(self, key: str) -> Lookup:
        digest, now = _digest(key), self._clock()
        expires, found = self._known.get(digest, (0.0, None))
        if found is None or now >= expires:
            found = await self._store.lookup(key)
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            self._known[digest] = (now + CACHE_TTL_S, found)
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def open_authenticator(store: KeyStore, host: str) -> Authenticator:
    """The authenticator of an ingress about to bind ``host``.

    Raises:
        UnsafeBinding: other machines could reach it and no key exists; the message says what to do.
        StoreUnavailable: Redis is away.
    """
    loopback = is_loopback(host)
    if not loopback and not await store.has_keys():
        raise UnsafeBinding(
            f"refusing to listen on {host}: there are no API keys, so anybody could use this server. "
            "Make one with `penstock keys create --tenant NAME`, or set PENSTOCK_INGRESS_HOST=127.0.0.1."
        )
    return Authenticator(store, open_mode=loopback)
