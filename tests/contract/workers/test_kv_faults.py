"""What can go wrong between a finished prefill and its reader: always computed again, exactly, and no block kept."""

from __future__ import annotations

import pytest

from penstock.workers import stream
from penstock.workers.loop import PAUSED_S
from tests.contract.workers.cluster import Cluster, Worker

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]

ANSWER = {"max_tokens": 20}


async def freed(cluster: Cluster, *workers: Worker) -> None:
    await cluster.until(lambda: all(not worker.engine.used_blocks for worker in workers), "no block is held")


@pytest.mark.parametrize("sampling", [ANSWER, ANSWER | {"seed": 1}], ids=["plain", "seed"])
async def test_prefill_replica_dies_before_the_read(split: Cluster, sampling: dict[str, int]) -> None:
    """[I2, I6] The dispatcher takes it from the decode replica, which waits for what will never come."""
    prefill, decode = split.add("prefill"), split.add("decode", held=True)
    split.dispatch(max_attempts=1)
    record = await split.send(9, sampling)
    await split.running_on(record, decode)
    split.add("prefill")
    prefill.die()

    async def taken() -> bool:
        return await split.field(record, "attempt") not in ("", "1")

    await split.until(taken, "the dispatcher has noticed")
    decode.engine.allow()
    await split.completes(record)
    await split.drained()
    await freed(split, decode)
    assert await split.field(record, "deaths") == "0"


async def test_prefill_replica_dies_after_the_read(split: Cluster) -> None:
    """Nobody cares: decode has what it needs."""
    prefill, decode = split.add("prefill"), split.add("decode", held=True)
    running = split.dispatch()
    record = await split.send(9, ANSWER)
    await split.running_on(record, decode)
    decode.engine.allow(3)
    await split.emitted(record, 3)
    await split.until(
        lambda: not running.dispatcher._books.errands[record.id].source, "the dispatcher knows that it was read"
    )
    prefill.die()
    await split.until(lambda: not running.dispatcher._router._prefill.seats, "its death was noticed")
    decode.engine.allow()
    await split.completes(record)
    assert await split.field(record, "attempt") == "1"
    await split.drained()


async def test_failing_loads(split: Cluster) -> None:
    """[I2, I6] Every second transfer fails."""
    prefill, decode = split.add("prefill"), split.add("decode", kv_load_fails_every=2)
    split.dispatch()
    await split.completes(*[await split.send(9, ANSWER) for _ in range(20)])
    await split.drained()
    await freed(split, prefill, decode)


async def test_hand_over_past_its_lease_is_not_read(split: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I2] It lay in the inbox for so long that the blocks may be somebody else's by now."""
    monkeypatch.setattr(stream, "KV_TRUST_S", -1.0)
    prefill, decode = split.add("prefill"), split.add("decode")
    split.dispatch()
    record = await split.send(9, ANSWER)
    await split.completes(record)
    assert [id_.endswith("r") for id_ in decode.engine.started] == [True]
    await split.drained()
    assert prefill.engine.started


async def test_paused_decode_replica_trusts_no_unread_cache(split: Cluster) -> None:
    """[I2] It did not run for longer than a lease lasts, between taking the request and reading its cache."""
    split.add("prefill")
    decode = split.add("decode", held=True)
    split.dispatch()
    record = await split.send(9, ANSWER)
    await split.running_on(record, decode)

    def anew() -> bool:
        decode.host._loop._seen_at -= 2 * PAUSED_S
        return any(id_.endswith("r") for id_ in decode.engine.started)

    await split.until(anew, "it starts anew")
    decode.engine.allow()
    await split.completes(record)
    await split.drained()
    await freed(split, decode)


async def test_cancelled_while_its_cache_waits_to_be_read(split: Cluster) -> None:
    """[I6] Freed in the replica that holds it and in the one that would have read it."""
    prefill, decode = split.add("prefill"), split.add("decode", held=True)
    split.dispatch()
    record = await split.send(9, ANSWER)
    await split.running_on(record, decode)
    assert prefill.engine.used_blocks > 0
    await split.log.cancel([record.id])
    decode.engine.allow()
    await split.end(record)
    await freed(split, prefill, decode)
    await split.drained()
