"""Which engine replicas are alive, and how loaded.

A replica renews one key with a short expiry; that key is the lease. Scripts that hand work over check it in the same
call, so work is never given to a replica whose lease has run out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
import redis
import redis.asyncio

from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings

HEARTBEAT_S = 0.5
"""Four heartbeats fit into a lease, so that one late beat (a long step holding the GIL) costs nothing."""
LEASE_S = 2.0
"""A dead replica is noticed within this time."""
INBOX_S = 60.0
"""How long an inbox outlives the last heartbeat. A replica that was only slow finds in it what it was given: a
dispatcher that did not see it gone counts on that, and what others took away meanwhile is fenced by its attempt."""


class Replica(msgspec.Struct, frozen=True):
    """What a replica says about itself. ``running`` and ``waiting`` are requests, KV figures are tokens."""

    id: str
    pool: str
    role: str
    max_seqs: int
    kv_tokens: int
    block_size: int
    max_model_len: int
    node: str
    pid: int
    metrics: str = ""
    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    draining: bool = False
    """It finishes what it has, and takes no more."""


_decoder = msgspec.msgpack.Decoder(Replica)


def _members(settings: RedisSettings) -> str:
    return f"{settings.namespace}replicas"


class Lease:
    """A replica's own end: renew, and end cleanly. Blocking; used by the heartbeat thread."""

    def __init__(self, client: redis.Redis, settings: RedisSettings, replica_id: str) -> None:
        self._client = client
        self._id = replica_id
        self._key = f"{settings.namespace}replica:{replica_id}"
        self._inbox = f"{settings.namespace}inbox:{replica_id}"
        self._left = f"{settings.namespace}left:{replica_id}"
        self._members = _members(settings)

    def renew(self, replica: Replica) -> None:
        """Renew the lease for :data:`LEASE_S` and publish the load."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(self._key, msgspec.msgpack.encode(replica), px=int(LEASE_S * 1000))
        pipeline.pexpire(self._inbox, int(INBOX_S * 1000))
        pipeline.sadd(self._members, self._id)
        with store_errors():
            pipeline.execute()

    def end(self) -> None:
        """Give the lease back at once, so that dispatchers need not wait for it to run out; what still runs is taken
        from it without counting as its victim."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(self._left, 1, px=int(INBOX_S * 1000))
        pipeline.delete(self._key, self._inbox)
        pipeline.srem(self._members, self._id)
        with store_errors():
            pipeline.execute()


class Registry:
    """The dispatcher's and ingress' view."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._ns = settings.namespace
        self._members = _members(settings)

    async def alive(self) -> dict[str, Replica]:
        """Replicas with a valid lease by id. Forgets those whose lease ran out."""
        with store_errors():
            members = cast(set[bytes], await self._client.smembers(self._members))
            ids = sorted(member.decode() for member in members)
            if not ids:
                return {}
            keys = [f"{self._ns}replica:{id_}" for id_ in ids]
            values = cast("list[bytes | None]", await self._client.mget(keys))
            dead = [id_ for id_, value in zip(ids, values, strict=True) if value is None]
            if dead:
                await self._forget(dead)
        replicas = [_decoder.decode(value) for value in values if value is not None]
        return {replica.id: replica for replica in replicas}

    async def departed(self, ids: Sequence[str]) -> set[str]:
        """Those among the gone that gave their lease back, and did not die."""
        with store_errors():
            values = cast("list[bytes | None]", await self._client.mget([f"{self._ns}left:{id_}" for id_ in ids]))
        return {id_ for id_, value in zip(ids, values, strict=True) if value is not None}

    async def _forget(self, dead: list[str]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        pipeline.srem(self._members, *dead)
        for id_ in dead:
            pipeline.pexpire(f"{self._ns}inbox:{id_}", int(INBOX_S * 1000))
        await pipeline.execute()
