"""Both backends of the request queue."""

from __future__ import annotations

import gc
import logging
import uuid
import warnings
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.settings import QueueSettings, RedisSettings
from queue_harness import Harness

logging.getLogger("kafka").setLevel(logging.CRITICAL)
"""Brokers are killed on purpose here, and a captured log record would keep the dropped sockets alive."""


@pytest_asyncio.fixture(params=["redis", "kafka"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A pool of its own on either backend."""
    redis_server: RedisServer = request.getfixturevalue("redis_server")
    bootstrap = "127.0.0.1:9"
    if request.param == "kafka":
        broker: KafkaBroker = request.getfixturevalue("kafka_broker")
        bootstrap = broker.bootstrap
    opened = Harness(
        QueueSettings(backend=request.param, bootstrap=bootstrap, partitions=2),
        RedisSettings(url=redis_server.url, namespace=f"t{uuid.uuid4().hex[:8]}:"),
    )
    yield opened
    await opened.close()
    with warnings.catch_warnings():  # kafka-python drops the sockets of refused connections without closing them
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
