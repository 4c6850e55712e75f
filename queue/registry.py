"""Which engine replicas are alive, and how loaded.

A replica renews one key with a short expiry; that key is the lease. Scripts that hand work over check it in the same
call, so work is never given to a replica whose lease has run out.

A replica also listens on a channel of its own, where nobody ever speaks. When its process dies the kernel closes that
connection at once: a replica whose heartbeat is late *and* that listens no more loses its lease before it runs out
(``vanished.lua``). One that is only slow, or stopped, still listens and keeps it to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
import redis
import redis.asyncio

from penstock.queue.redis_client import store_errors
from penstock.queue.scripts import script
from penstock.queue.settings import RedisSettings

HEARTBEAT_S = 0.5
"""Four heartbeats fit into a lease, so that one late beat (a long step holding the GIL) costs nothing."""
LEASE_S = 2.0
"""A dead replica is noticed within this time."""
LATE_S = 0.75
"""A heartbeat that has not come for so long is late: one and a half of them."""
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
    listens: bool = False
    """Whether it has a channel by which to see that it lives."""


_IN_TIME_MS = int((LEASE_S - LATE_S) * 1000)
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
        self._channel = f"{settings.namespace}alive:{replica_id}"
        self._alive = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]

    def renew(self, replica: Replica) -> None:
        """Renew the lease for :data:`LEASE_S` and publish the load."""
        replica = msgspec.structs.replace(replica, listens=True)
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(self._key, msgspec.msgpack.encode(replica), px=int(LEASE_S * 1000))
        pipeline.pexpire(self._inbox, int(INBOX_S * 1000))
        pipeline.sadd(self._members, self._id)
        with store_errors():
            pipeline.execute()
        self._listen()

    def _listen(self) -> None:
        """Subscribe, and look for messages that never come: that is how a lost connection is noticed."""
        try:
            if self._alive.subscribed:
                self._alive.get_message()
            else:
                self._alive.subscribe(self._channel)
        except (redis.ConnectionError, redis.TimeoutError):
            self._alive.close()  # again with the next heartbeat

    def end(self) -> None:
        """Give the lease back at once, so that dispatchers need not wait for it to run out; what still runs is taken
        from it without counting as its victim."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(self._left, 1, px=int(INBOX_S * 1000))
        pipeline.delete(self._key, self._inbox)
        pipeline.srem(self._members, self._id)
        self._alive.close()
        with store_errors():
            pipeline.execute()


class Registry:
    """The dispatcher's and ingress' view."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._ns = settings.namespace
        self._members = _members(settings)
        self._written = f"{settings.namespace}written"
        self._vanished = client.register_script(script("vanished"))

    async def alive(self) -> dict[str, Replica]:
        """Replicas with a valid lease by id. Forgets those whose lease ran out, or whose process is gone.

        Raises:
            StoreUnavailable: Redis did not answer, or takes no writes: then nobody can renew a lease, and that none is
                valid says nothing about replicas.
        """
        with store_errors():
            members = await self._listed()
            ids = sorted(member.decode() for member in members)
            if not ids:
                return {}
            replicas, late = await self._leases(ids)
            for id_ in await self._take(late) if late else ():
                del replicas[id_]
            if len(replicas) < len(ids):
                await self._forget([id_ for id_ in ids if id_ not in replicas])
        return replicas

    async def _listed(self) -> set[bytes]:
        """Who renewed a lease here and is not forgotten; with a write of the kind that a full Redis refuses."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(self._written, 1, px=int(LEASE_S * 1000))
        pipeline.smembers(self._members)
        _, members = await pipeline.execute()
        return cast(set[bytes], members)

    async def _leases(self, ids: Sequence[str]) -> tuple[dict[str, Replica], list[str]]:
        """Those that have one, and which of them are late to renew it."""
        pipeline = self._client.pipeline(transaction=False)
        for id_ in ids:
            pipeline.get(f"{self._ns}replica:{id_}")
            pipeline.pttl(f"{self._ns}replica:{id_}")
        answers = await pipeline.execute()
        left = dict(zip(ids, answers[1::2], strict=True))
        replicas = {id_: _decoder.decode(value) for id_, value in zip(ids, answers[::2], strict=True) if value}
        return replicas, [id_ for id_, replica in replicas.items() if replica.listens and left[id_] < _IN_TIME_MS]

    async def _take(self, late: Sequence[str]) -> list[str]:
        return [id_.decode() for id_ in await self._vanished(args=(self._ns, _IN_TIME_MS, *late))]

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
