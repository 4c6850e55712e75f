"""API keys in a real Redis: made, used, revoked, and what happens while Redis is away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import cast

import pytest
import pytest_asyncio
import redis.asyncio

from penstock.queue.errors import RequestError, StoreUnavailable
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.errors import Unauthorized
from penstock.serving.tenants import ANYBODY, CACHE_TTL_S, Authenticator, KeyStore

pytestmark = pytest.mark.contract


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def settings(redis_server: RedisServer) -> RedisSettings:
    return RedisSettings(url=redis_server.url, namespace=f"keys-{new_request_id()}:")


@pytest_asyncio.fixture
async def client(settings: RedisSettings) -> AsyncIterator[redis.asyncio.Redis]:
    async with connect_async(settings) as client:
        yield client


@pytest.fixture
def store(client: redis.asyncio.Redis, settings: RedisSettings) -> KeyStore:
    return KeyStore(client, settings)


@pytest.mark.asyncio
async def test_a_key_is_known_until_it_is_revoked(store: KeyStore) -> None:
    key, info = await store.create("acme", "laptop")
    other, _ = await store.create("blue")
    assert re.fullmatch(r"sk-ps-[\w-]{43}", key)
    assert await store.lookup(key) == (info, True)
    assert [(i.tenant, i.label) for i in await store.entries()] == [("acme", "laptop"), ("blue", "")]
    assert await store.revoke(info.id)
    assert not await store.revoke(info.id)
    assert await store.lookup(key) == (None, True)
    assert (await store.lookup(other)).owner is not None


@pytest.mark.asyncio
async def test_redis_never_sees_the_key(store: KeyStore, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
    key, _ = await store.create("acme")
    stored = cast(dict[bytes, bytes], await client.hgetall(f"{settings.namespace}keys"))
    assert key.encode() not in b"".join(part for pair in stored.items() for part in pair)
    assert [len(digest) for digest in stored] == [32]


@pytest.mark.asyncio
@pytest.mark.parametrize("tenant", ["", "-a", "a b", "a" * 64, "ä"])
async def test_tenant_names_are_checked(store: KeyStore, tenant: str) -> None:
    with pytest.raises(RequestError, match="tenant"):
        await store.create(tenant)
    assert not await store.has_keys()


@pytest.mark.asyncio
async def test_an_ingress_follows_within_the_ttl(store: KeyStore) -> None:
    clock = Clock()
    authenticator = Authenticator(store, open_mode=True, clock=clock)
    assert await authenticator.authenticate(None) == ANYBODY
    key, info = await store.create("acme")
    clock.now += CACHE_TTL_S
    with pytest.raises(Unauthorized):
        await authenticator.authenticate(None)
    assert (await authenticator.authenticate(key)).tenant == "acme"
    await store.create("blue")
    await store.revoke(info.id)
    clock.now += CACHE_TTL_S
    with pytest.raises(Unauthorized):
        await authenticator.authenticate(key)


@pytest.mark.asyncio
async def test_redis_away(settings: RedisSettings) -> None:
    away = settings.model_copy(update={"url": "redis://127.0.0.1:1/0"})
    async with connect_async(away) as client:
        with pytest.raises(StoreUnavailable):
            await KeyStore(client, away).lookup("sk-x")


def test_the_command_line(settings: RedisSettings) -> None:
    def keys(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "penstock.serving.cli", "keys", *words],
            env=os.environ | {"PENSTOCK_REDIS_URL": settings.url, "PENSTOCK_REDIS_NAMESPACE": settings.namespace},
            capture_output=True,
            text=True,
            check=False,
        )

    key = keys("create", "--tenant", "acme", "--name", "laptop").stdout.strip()
    (line,) = keys("list").stdout.splitlines()
    key_id, tenant, label, _ = line.split("\t")
    assert (tenant, label) == ("acme", "laptop")
    assert key.startswith("sk-ps-")
    assert key not in line
    assert keys("revoke", key_id).returncode == 0
    assert keys("list").stdout == ""
    assert keys("revoke", key_id).returncode == 1
    assert keys("create", "--tenant", "no spaces").returncode == 2
