"""Pools of the two shapes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.settings import QueueSettings, RedisSettings
from tests.contract.servers import start
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
async def lossy(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A pool on a Redis of its own, to be killed."""
    async for cluster in on_own_redis(tmp_path, MIXED):
        yield cluster


@pytest_asyncio.fixture
async def split_lossy(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A split pool on a Redis of its own, to be killed."""
    async for cluster in on_own_redis(tmp_path, SPLIT):
        yield cluster


async def on_own_redis(folder: Path, shape: dict[str, Any]) -> AsyncIterator[Cluster]:
    server = RedisServer(folder / "redis")
    await asyncio.to_thread(start, server)
    cluster = Cluster(settings(server), shape)
    cluster.server = server
    yield cluster
    await cluster.close()
    await asyncio.to_thread(server.stop)


@pytest_asyncio.fixture
async def split(redis_server: RedisServer) -> AsyncIterator[Cluster]:
    """A prefill and a decode pool; every prompt goes through both."""
    cluster = Cluster(settings(redis_server), SPLIT)
    yield cluster
    await cluster.close()


@pytest_asyncio.fixture
async def on_kafka(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A mixed pool on a Kafka of its own, to be killed."""
    broker = KafkaBroker(tmp_path / "kafka")
    await asyncio.to_thread(start, broker)
    queue = QueueSettings(backend="kafka", bootstrap=broker.bootstrap, partitions=2)
    cluster = Cluster(settings(redis_server), MIXED, queue)
    cluster.broker = broker
    yield cluster
    await cluster.close()
    await asyncio.to_thread(broker.stop)
