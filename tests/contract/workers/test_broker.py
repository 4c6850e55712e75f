"""A pool on Kafka whose broker, consumers or client misbehave."""

from __future__ import annotations

import asyncio
import threading

import pytest
from confluent_kafka import Message

from penstock.queue import kafka_consumer
from penstock.queue.kafka import KafkaQueue
from tests.contract.workers.cluster import PATIENCE_S, Cluster

pytestmark = [pytest.mark.contract, pytest.mark.asyncio, pytest.mark.timeout(300)]


async def test_broker_bounces_under_load(on_kafka: Cluster) -> None:
    """[I1, I5] What runs goes on without it, what waits is still there, and ends are committed when it is back."""
    assert on_kafka.broker is not None
    worker = on_kafka.add(held=True, max_num_seqs=2)
    on_kafka.dispatch()
    records = [await on_kafka.send(5, {"max_tokens": 30}) for _ in range(5)]
    await on_kafka.until(lambda: len(worker.engine.started) == 2, "two run, three wait")
    await asyncio.to_thread(on_kafka.broker.kill)
    first = [record for record in records if any(id_.startswith(record.id) for id_ in worker.engine.started)]
    worker.engine.allow()
    await on_kafka.completes(*first)
    await asyncio.to_thread(on_kafka.broker.start)
    await on_kafka.completes(*records)
    await on_kafka.drained()
    runs = {await on_kafka.field(record, "runs") for record in records}
    assert runs == {"1"}


async def test_rebalances_repeat_nothing(on_kafka: Cluster) -> None:
    """[I1, I2] Consumers come and go all the time; what runs is adopted, not run again."""
    on_kafka.add()
    stays = on_kafka.dispatch(dispatchers=2)
    records = []
    for _ in range(3):
        records += [await on_kafka.send(7, {"max_tokens": 40}) for _ in range(15)]
        passing = on_kafka.dispatch(dispatchers=2)
        await on_kafka.completes(records[-1])
        on_kafka._dispatchers.remove(passing)
        await passing.stop()
    await on_kafka.completes(*records)
    await on_kafka.drained()
    assert {await on_kafka.field(record, "runs") for record in records} == {"1"}
    assert stays.queue.healthy


async def test_client_that_hangs_ends_the_dispatcher(on_kafka: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is replaced; waiting for a call that never returns helps nobody."""
    on_kafka.add()
    running = on_kafka.dispatch()
    await on_kafka.completes(await on_kafka.send())
    assert isinstance(running.queue, KafkaQueue)
    returns = threading.Event()
    with monkeypatch.context() as hanging:
        hanging.setattr(kafka_consumer, "STALL_S", 2.0)
        hanging.setattr(kafka_consumer, "take", lambda *_: list[Message]() if returns.wait() else None)
        done, _ = await asyncio.wait({running._task}, timeout=PATIENCE_S)
    returns.set()
    assert done
    error = running._task.exception()
    assert isinstance(error, ExceptionGroup)
    assert "hangs" in str(error.exceptions[0])
    on_kafka._dispatchers.remove(running)
    await running.queue.close()
    await running._client.aclose()
    on_kafka.dispatch()
    await on_kafka.completes(await on_kafka.send())
    await on_kafka.drained()
