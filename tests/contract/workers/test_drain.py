"""Replicas and dispatchers that are told to end: nothing fails, nothing is repeated, nobody is blamed."""

from __future__ import annotations

import asyncio

import pytest

from penstock.workers.host import NOTICE_S
from tests.contract.workers.cluster import PATIENCE_S, Cluster

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


async def test_drained_replica_finishes_what_it_runs(mixed: Cluster) -> None:
    """And gets nothing new meanwhile."""
    old = mixed.add(held=True)
    running = mixed.dispatch()
    first = await mixed.send(5, {"max_tokens": 20})
    await mixed.running_on(first, old)
    draining = asyncio.create_task(asyncio.to_thread(old.drain, PATIENCE_S))
    (seat,) = running.dispatcher._router._decode.seats.values()
    await mixed.until(lambda: seat.closed, "the dispatcher places nothing more there")
    second = await mixed.send()
    mixed.add()
    await mixed.completes(second)
    old.engine.allow()
    await mixed.completes(first)
    await draining
    assert await mixed.field(first, "runs") == await mixed.field(second, "runs") == "1"
    assert len(old.engine.started) == 1
    await mixed.drained()


@pytest.mark.parametrize("sampling", [{"max_tokens": 60}, {"max_tokens": 60, "seed": 1}], ids=["continue", "replay"])
async def test_what_outlives_the_grace_goes_on_elsewhere(mixed: Cluster, sampling: dict[str, int]) -> None:
    old = mixed.add(held=True)
    mixed.dispatch(max_attempts=1)
    record = await mixed.send(5, sampling)
    old.engine.allow(7)
    await mixed.emitted(record, 7)
    mixed.add()
    await asyncio.to_thread(old.drain, 0)
    await mixed.completes(record)
    assert (await mixed.field(record, "runs"), await mixed.field(record, "deaths")) == ("2", "0")
    await mixed.drained()


async def test_late_arrivals_are_given_back(mixed: Cluster) -> None:
    """A dispatcher that has not read the notice yet: its work comes back and does not count."""
    old = mixed.add()
    running = mixed.dispatch(max_attempts=1)
    await mixed.until(lambda: bool(running.dispatcher._router._decode.seats), "the replica is known")
    old.host._inbox.draining = True
    record = await mixed.send()
    await mixed.until(lambda: record.id in running.dispatcher._books.waiting, "it came back")
    mixed.add()
    await mixed.completes(record)
    assert old.engine.started == []
    await mixed.drained()


async def test_drained_replica_stays_for_its_readers(split: Cluster) -> None:
    """[I8] Its last answer is with a decode replica that has not read the KV cache yet."""
    prefill, decode = split.add("prefill"), split.add("decode", held=True)
    split.dispatch(max_attempts=1)
    record = await split.send(9, {"max_tokens": 20})
    await split.running_on(record, decode)
    began = prefill.host.last_beat
    draining = asyncio.create_task(asyncio.to_thread(prefill.drain, PATIENCE_S))
    await split.until(
        lambda: draining.done() or prefill.host.last_beat > began + 3 * NOTICE_S, "it could have left by now"
    )
    assert not draining.done()
    decode.engine.allow()
    await split.completes(record)
    await draining
    assert (await split.field(record, "attempt"), len(decode.engine.started)) == ("1", 1)
    await split.drained()


@pytest.mark.chaos
@pytest.mark.parametrize("grace_s", [0.0, PATIENCE_S], ids=["no grace", "grace"])
async def test_rolling_replacement(split: Cluster, grace_s: float) -> None:
    """[I5, I8] Every process once, under load: 0 failed, 0 repeated, nobody blamed."""
    fleet = {role: [split.add(role), split.add(role)] for role in ("prefill", "decode")}
    running = split.dispatch(max_attempts=1)
    split.shape |= {"max_attempts": 1}
    records = []
    for turn in range(2):
        for role, workers in fleet.items():
            records += [await split.send(9, {"max_tokens": 40}) for _ in range(12)]
            workers.append(split.add(role))
            await asyncio.to_thread(workers[turn].drain, grace_s)
        running = await split.replace(running)
    await split.completes(*records)
    await split.drained()
    deaths = {await split.field(record, "deaths") for record in records}
    assert deaths <= {"0"}
    await split.until(lambda: running.dispatcher._books.errands == {}, "the dispatcher holds nothing")
