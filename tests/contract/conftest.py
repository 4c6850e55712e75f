"""Real servers, started once for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from tests.contract.servers import start


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for every test of the session."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    start(server)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A Kafka for every test of the session."""
    broker = KafkaBroker(tmp_path_factory.mktemp("kafka"))
    start(broker)
    yield broker
    broker.stop()
