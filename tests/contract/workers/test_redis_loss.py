"""A Redis that is killed and comes back without what was written last, under a working pool."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.workers.cluster import Cluster
from tests.support.earlier import Earlier

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

LONG = {"max_tokens": 60}


async def lose(cluster: Cluster, moment: Earlier) -> None:
    """Redis dies and comes back as it was then; the test's own connections begin anew."""
    await asyncio.to_thread(moment.restore)
    await cluster.client.connection_pool.disconnect()


async def test_tokens_are_appended_again(lossy: Cluster) -> None:
    """[I2, I4] Half-way and ended answers alike: the log holds what the client was sent."""
    assert lossy.server is not None
    worker = lossy.add(held=True)
    lossy.dispatch()
    half, ended = await lossy.send(5, LONG), await lossy.send(5, {"max_tokens": 10})
    for record in (half, ended):
        await lossy.running_on(record, worker)
    worker.engine.allow(5)
    await lossy.emitted(half, 5)
    moment = await asyncio.to_thread(Earlier, lossy.server)
    worker.engine.allow(10)
    await lossy.emitted(half, 15)
    await lossy.completes(ended)
    await lose(lossy, moment)
    worker.engine.allow()
    await lossy.completes(half, ended)
    assert len(worker.engine.started) == 2, "nothing was generated again"
    assert await lossy.field(half, "attempt") == await lossy.field(ended, "attempt") == "1"
    await lossy.drained()


async def test_dispatches_are_made_again(lossy: Cluster) -> None:
    """[I1, I2] Redis has never heard of the attempts that run."""
    assert lossy.server is not None
    worker = lossy.add(held=True)
    records = [await lossy.send(5, LONG) for _ in range(3)]
    moment = await asyncio.to_thread(Earlier, lossy.server)
    lossy.dispatch()
    for record in records:
        await lossy.running_on(record, worker)
    worker.engine.allow(5)
    for record in records:
        await lossy.emitted(record, 3)
    await lose(lossy, moment)
    worker.engine.allow()
    await lossy.completes(*records)
    await lossy.drained()


@pytest.mark.parametrize("place", ["prefill", "decode"])
async def test_hand_over_is_made_again(split_lossy: Cluster, place: str) -> None:
    """[I2] The moment that is lost holds the way from one replica to the other."""
    cluster = split_lossy
    assert cluster.server is not None
    prefill, decode = cluster.add("prefill", held=True), cluster.add("decode", held=True)
    cluster.dispatch()
    record = await cluster.send(5, LONG)
    await cluster.running_on(record, prefill)
    moment = await asyncio.to_thread(Earlier, cluster.server)
    prefill.engine.allow()
    await cluster.running_on(record, decode)
    if place == "decode":
        decode.engine.allow(4)
        await cluster.emitted(record, 4)
    await lose(cluster, moment)
    decode.engine.allow()
    await cluster.completes(record)
    await cluster.drained()
