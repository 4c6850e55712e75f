"""The asyncio clients under a crowd."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import pytest
import redis.asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.payloads import connect_once
from penstock.queue.redis_client import MAX_CONNECTIONS, connect_async
from penstock.queue.settings import RedisSettings

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


@pytest.mark.parametrize("open_client", [connect_async, connect_once])
async def test_more_commands_than_connections_wait_their_turn(
    open_client: Callable[[RedisSettings], redis.asyncio.Redis], redis_server: RedisServer
) -> None:
    """[I1] A burst of requests is not refused because each of them has something to ask Redis."""
    crowd, key = 8 * MAX_CONNECTIONS, uuid.uuid4().hex
    async with open_client(RedisSettings(url=redis_server.url)) as client:
        found = await asyncio.gather(*(client.incr(key) for _ in range(crowd)))
        mine = [one for one in await client.client_list() if one["cmd"].startswith("incr")]
    assert sorted(found) == list(range(1, crowd + 1))
    assert 0 < len(mine) <= MAX_CONNECTIONS
