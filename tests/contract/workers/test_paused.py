"""Owners that stop without dying: what they held goes to others, and when they wake they change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.registry import Registry
from penstock.queue.settings import QueueSettings
from tests.contract.workers.cluster import MIXED, Cluster
from tests.contract.workers.conftest import settings
from tests.contract.workers.paused import running

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


@pytest_asyncio.fixture(params=["redis", "kafka"])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """A mixed pool on either queue."""
    redis_server: RedisServer = request.getfixturevalue("redis_server")
    queue = QueueSettings(backend="redis")
    if request.param == "kafka":
        broker: KafkaBroker = request.getfixturevalue("kafka_broker")
        queue = QueueSettings(backend="kafka", bootstrap=broker.bootstrap, partitions=2)
    cluster = Cluster(settings(redis_server), MIXED, queue)
    yield cluster
    await cluster.close()


async def test_paused_replica_is_fenced(mixed: Cluster, tmp_path: Path) -> None:
    """[I3, I4] It is stopped in the middle of an answer, outlives its lease, and wakes when another has finished."""
    mixed.dispatch()
    registry = Registry(mixed.client, mixed.settings)

    async def forgotten() -> bool:
        replicas = await registry.alive()
        return len(replicas) == 2 and all(replica.running == 0 for replica in replicas.values())

    with running(tmp_path, mixed.queue_settings, mixed.settings, "engine", "--role", "mixed") as paused:
        record = await mixed.send(5, {"max_tokens": 400})
        await mixed.emitted(record, 5)
        paused.pause()
        mixed.add()
        await mixed.completes(record)
        assert await mixed.field(record, "deaths") in ("", "1")
        before = await mixed.log.read(record.id)
        paused.wake()
        await mixed.until(forgotten, "what it goes on with is refused, and it drops the request")
        assert await mixed.log.read(record.id) == before
        late = await mixed.send()
        await mixed.completes(late)
    await mixed.drained()


async def test_told_to_end_while_it_stands_still(mixed: Cluster, tmp_path: Path) -> None:
    """SIGTERM then waits for the process, and when it goes on any of its threads may get it."""
    with running(tmp_path, mixed.queue_settings, mixed.settings, "engine", "--role", "mixed") as told:
        await mixed.until(lambda: told.logged("replica_ready") > 0, "it is up")
        told.pause()
        told.terminate()
        told.wake()
        await mixed.until(lambda: not told.alive, "it has ended")


async def test_paused_dispatcher_undoes_nothing(either: Cluster, tmp_path: Path) -> None:
    """[I1, I3] A successor adopts what ran and finishes it; the first one wakes with all of it on its books."""
    worker = either.add(held=True)
    with running(tmp_path, either.queue_settings, either.settings, "dispatcher") as paused:
        ended, moved = await either.send(5, {"max_tokens": 30}), await either.send(5, {"max_tokens": 60})
        for record in (ended, moved):
            await either.running_on(record, worker)
        worker.engine.allow(5)
        await either.emitted(moved, 3)
        await either.emitted(ended, 3)
        owner = await either.field(moved, "dispatcher")
        paused.pause()
        either.dispatch(dispatchers=2)

        async def adopted() -> bool:
            return owner not in (await either.field(ended, "dispatcher"), await either.field(moved, "dispatcher"))

        await either.until(adopted, "the successor watches both")
        worker.engine.allow(35)
        await either.completes(ended)
        successor = either.add(held=True)
        worker.die()
        await either.running_on(moved, successor)
        attempt = await either.field(moved, "attempt")
        paused.wake()
        late = await either.send()
        successor.engine.allow()
        await either.completes(moved, late)
        await either.drained()
        assert await either.field(moved, "attempt") == attempt
        assert await either.field(ended, "runs") == "1"
        assert paused.alive
