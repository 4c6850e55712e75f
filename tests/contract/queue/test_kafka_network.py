"""The network between a queue client and Kafka: late, cut, or connected to nobody; and brokers that change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from confluent_kafka.admin import AdminClient
from pydantic import ValidationError

from penstock.queue.errors import QueueUnavailable
from penstock.queue.kafka_client import SESSION_S, open_client, session_s
from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import free_port
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.protocol import RequestQueue
from penstock.queue.settings import QueueSettings
from tests.contract.queue.harness import PLENTY, Harness, settings
from tests.contract.servers import start
from tests.support.fault_proxy import FaultProxy
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.contract
TOLD_S = 30.0
"""A caller is told long before this that Kafka is out of reach."""
BACK_S = 60.0


@dataclass(frozen=True)
class Far:
    """A queue behind a proxy."""

    harness: Harness
    proxy: FaultProxy


@pytest_asyncio.fixture
async def far(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Far]:
    port = free_port()
    proxy = FaultProxy(tmp_path, port)
    broker = KafkaBroker(tmp_path / "kafka", port=port, advertised=proxy.port)
    start(broker)
    start(proxy)
    harness = Harness(*settings("kafka", f"127.0.0.1:{proxy.port}", redis_server.url))
    yield Far(harness, proxy)
    proxy.heal()
    await harness.close()
    proxy.stop()
    broker.stop()


async def refused(call: Callable[[], object]) -> None:
    """It says in bounded time that the queue is not available."""
    with pytest.raises(QueueUnavailable):
        async with asyncio.timeout(TOLD_S):
            await call()  # type: ignore[misc]


@pytest.mark.asyncio
@pytest.mark.parametrize("fault", [FaultProxy.cut, FaultProxy.silence])
async def test_kafka_out_of_reach(far: Far, fault: Callable[[FaultProxy], None]) -> None:
    """[I1, I5] Callers are told, what was acknowledged is there afterwards, and the same clients go on."""
    ours, theirs = far.harness.open(), far.harness.open()
    first = far.harness.record()
    await eventually_async(lambda: published(ours, first), BACK_S, "Kafka takes work")  # a busy machine takes its time
    taken = await theirs.pull(PLENTY)
    assert {delivery.record.id for delivery in taken} == {first.id}
    got: list[str] = []
    consuming = asyncio.create_task(consume(theirs, got))
    fault(far.proxy)
    await refused(lambda: ours.publish(far.harness.record()))
    await refused(ours.depth)
    await refused(ours.ping)
    await theirs.complete(taken)
    far.proxy.heal()
    second = far.harness.record()
    await eventually_async(lambda: published(ours, second), BACK_S, "Kafka takes work again")
    await eventually_async(lambda: empty(ours), BACK_S, "all is finished")
    assert theirs.healthy
    assert second.id in got
    consuming.cancel()
    await asyncio.gather(consuming, return_exceptions=True)


async def consume(queue: RequestQueue, got: list[str]) -> None:
    """Take and finish everything."""
    while True:
        deliveries = await queue.pull(PLENTY)
        got += [delivery.record.id for delivery in deliveries]
        await queue.complete(deliveries)


async def published(queue: RequestQueue, record: object) -> bool:
    try:
        await queue.publish(record)  # type: ignore[arg-type]
    except QueueUnavailable:
        return False
    return True


async def empty(queue: RequestQueue) -> bool:
    try:
        return sum(depth.requests for depth in (await queue.depth()).values()) == 0
    except QueueUnavailable:
        return False


def test_sessions_are_as_short_as_the_brokers_allow(kafka_broker: KafkaBroker) -> None:
    """A real broker tells its limit. The local ones allow what a dispatcher's lease is on Redis."""
    admin = open_client(AdminClient, QueueSettings(backend="kafka", bootstrap=kafka_broker.bootstrap))
    assert session_s(admin) == SESSION_S


def test_nobody_can_ask_for_more_copies_than_there_are() -> None:
    with pytest.raises(ValidationError, match="min_insync"):
        QueueSettings(replication=2, min_insync=3)


@pytest.mark.parametrize(("replication", "insync"), [(1, 1), (2, 1), (3, 2)])
def test_one_broker_may_be_away(replication: int, insync: int) -> None:
    assert QueueSettings(replication=replication).min_insync_replicas == insync
