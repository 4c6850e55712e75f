"""The backlog figure dispatchers publish, so that an ingress or an autoscaler need not ask the broker."""

from __future__ import annotations

from typing import cast

import msgspec
import redis.asyncio

from penstock.queue.protocol import Depth
from penstock.queue.records import PriorityClass
from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings

BACKLOG_TTL_MS = 10_000
"""A figure older than this says nothing: no dispatcher is left to renew it."""

_decoder = msgspec.msgpack.Decoder(dict[PriorityClass, Depth])


def _key(settings: RedisSettings, pool: str) -> str:
    return f"{settings.namespace}backlog:{pool}"


async def write_backlog(
    client: redis.asyncio.Redis, settings: RedisSettings, pool: str, depth: dict[PriorityClass, Depth]
) -> None:
    """Publish the backlog of one pool by class."""
    with store_errors():
        await client.set(_key(settings, pool), msgspec.msgpack.encode(depth), px=BACKLOG_TTL_MS)


async def read_backlog(client: redis.asyncio.Redis, settings: RedisSettings, pool: str) -> dict[PriorityClass, Depth]:
    """The backlog by class; empty when nobody has reported lately."""
    with store_errors():
        data = await client.get(_key(settings, pool))
    return {} if data is None else _decoder.decode(cast(bytes, data))
