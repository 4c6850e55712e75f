"""Pools of the two shapes."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest_asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.settings import RedisSettings
from tests.contract.workers.cluster import MIXED, SPLIT, Cluster


def settings(redis_server: RedisServer) -> RedisSettings:
    return RedisSettings(url=redis_server.url, namespace=f"dp{uuid.uuid4().hex[:8]}:")


@pytest_asyncio.fixture
async def mixed(redis_server: RedisServer) -> AsyncIterator[Cluster]:
    """A pool whose engines do everything."""
    cluster = Cluster(settings(redis_server), MIXED)
    yield cluster
    await cluster.close()


@pytest_asyncio.fixture
async def split(redis_server: RedisServer) -> AsyncIterator[Cluster]:
    """A prefill and a decode pool; every prompt goes through both."""
    cluster = Cluster(settings(redis_server), SPLIT)
    yield cluster
    await cluster.close()
