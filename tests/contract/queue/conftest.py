"""Both backends of the request queue."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.settings import RedisSettings
from tests.contract.queue.harness import Harness
from tests.contract.queue.harness import settings as settings_of
from tests.contract.queue.logs import Store, Wire
from tests.contract.servers import Server, start


@pytest_asyncio.fixture(params=["redis", "kafka"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A pool of its own on either backend."""
    redis_server: RedisServer = request.getfixturevalue("redis_server")
    bootstrap = "127.0.0.1:9"
    if request.param == "kafka":
        broker: KafkaBroker = request.getfixturevalue("kafka_broker")
        bootstrap = broker.bootstrap
    opened = Harness(*settings_of(request.param, bootstrap, redis_server.url))
    yield opened
    await opened.close()


@pytest_asyncio.fixture(params=["redis", "kafka"])
async def outage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Harness, Server]]:
    """A pool on a broker of its own, to be killed and brought back."""
    shared: RedisServer = request.getfixturevalue("redis_server")
    server = RedisServer(tmp_path) if request.param == "redis" else KafkaBroker(tmp_path)
    start(server)
    url = server.url if isinstance(server, RedisServer) else shared.url
    bootstrap = server.bootstrap if isinstance(server, KafkaBroker) else "127.0.0.1:9"
    opened = Harness(*settings_of(request.param, bootstrap, url))
    yield opened, server
    await opened.close()
    server.stop()


@pytest.fixture
def settings(redis_server: RedisServer) -> RedisSettings:
    """A namespace of its own."""
    return RedisSettings(url=redis_server.url, namespace=f"log{uuid.uuid4().hex[:8]}:")


@pytest_asyncio.fixture
async def store(settings: RedisSettings) -> AsyncIterator[Store]:
    """A token log, with leases of two replicas."""
    opened = Store(settings)
    opened.lease("a", "b")
    yield opened
    await opened.close()


@pytest.fixture
def wire(store: Store) -> Iterator[Wire]:
    """What is published of it."""
    opened = Wire(store)
    yield opened
    opened.close()
