"""Who counts as alive: the lease is the truth, and a closed connection a hint that it need not be waited for."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import redis

from penstock.queue import registry
from penstock.queue.errors import StoreUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.registry import Lease, Registry, Replica
from penstock.queue.settings import RedisSettings
from tests.contract.servers import start
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

LONG_S = 600.0
"""A lease that no test waits for."""
WITHIN_S = 30.0


class One:
    """A replica's lease, and who looks at it."""

    def __init__(self, server: RedisServer) -> None:
        self.settings = RedisSettings(url=server.url, namespace=f"rg{uuid.uuid4().hex[:8]}:")
        self.replica = Replica("a", "p", "mixed", 1, 1, 1, 1, "here", os.getpid())
        self.blocking = connect(self.settings)
        self.lease = Lease(self.blocking, self.settings, "a")
        self.client = connect_async(self.settings)
        self.registry = Registry(self.client, self.settings)

    async def lives(self) -> bool:
        return "a" in await self.registry.alive()

    async def listening(self, count: int) -> bool:
        ((_, listening),) = await self.client.pubsub_numsub(f"{self.settings.namespace}alive:a")
        return int(listening) == count

    async def await_listening(self, count: int) -> None:
        await eventually_async(lambda: self.listening(count), WITHIN_S, f"{count} listen")

    def die(self) -> None:
        """What the kernel does to a dead process' connections."""
        self.lease._alive.close()
        self.blocking.close()


@pytest_asyncio.fixture
async def one(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[One]:
    """Its lease is long, and every heartbeat late."""
    monkeypatch.setattr(registry, "LEASE_S", LONG_S)
    monkeypatch.setattr(registry, "_IN_TIME_MS", int(LONG_S * 1000))
    opened = One(redis_server)
    await eventually_async(lambda: up_for_long(opened.blocking), WITHIN_S, "the server has been up for a while")
    yield opened
    opened.die()
    await opened.client.aclose()


async def up_for_long(client: redis.Redis) -> bool:
    info: dict[str, int] = client.info("server")  # type: ignore[assignment]
    return info["uptime_in_seconds"] >= 5


async def test_a_dead_process_loses_its_lease_at_once(one: One) -> None:
    """[I3] Not only when it runs out; and so that no script hands work over to it any more."""
    one.lease.renew(one.replica)
    await one.await_listening(1)
    one.die()
    await one.await_listening(0)
    assert not await one.lives()
    assert await one.client.exists(f"{one.settings.namespace}replica:a") == 0


async def test_one_that_is_only_late_keeps_it(one: One) -> None:
    """A stopped process, or one that computes for long, may still wake in time."""
    one.lease.renew(one.replica)
    await one.await_listening(1)
    assert await one.lives()


async def test_one_in_time_need_not_be_connected(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection broke, and it renews its lease over another one."""
    one.lease.renew(one.replica)
    one.lease._alive.close()
    await one.await_listening(0)
    monkeypatch.setattr(registry, "_IN_TIME_MS", 1000)
    assert await one.lives()


async def test_it_listens_again_after_its_connection_broke(one: One) -> None:
    one.lease.renew(one.replica)
    await one.await_listening(1)
    await one.client.client_kill_filter(_type="pubsub", skipme=True)
    await one.await_listening(0)
    await eventually_async(lambda: renewed(one), WITHIN_S, "it listens again")
    assert await one.lives()


async def renewed(one: One) -> bool:
    """Noticing the loss closes a connection that Redis may not have missed yet, hence both conditions."""
    one.lease.renew(one.replica)
    return one.lease._alive.subscribed and await one.listening(1)


async def test_a_redis_that_takes_no_writes_tells_nothing(tmp_path: Path) -> None:
    """[I8] It refuses heartbeats, and would answer that nobody has a lease."""
    server = RedisServer(tmp_path)
    start(server)
    one = One(server)
    await one.client.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailable):
        await one.lives()
    await one.client.config_set("maxmemory", 0)
    assert not await one.lives()
    one.die()
    await one.client.aclose()
    server.stop()


@pytest.mark.parametrize("restart", [RedisServer.stop, RedisServer.kill])
async def test_nobody_is_connected_to_a_server_that_has_just_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: Callable[[RedisServer], None]
) -> None:
    """That says nothing about anybody."""
    monkeypatch.setattr(registry, "LEASE_S", LONG_S)
    monkeypatch.setattr(registry, "_IN_TIME_MS", int(LONG_S * 1000))
    server = RedisServer(tmp_path)
    start(server)
    one = One(server)
    one.lease.renew(one.replica)
    restart(server)
    server.start()
    assert await one.lives()
    one.die()
    await one.client.aclose()
    server.stop()
