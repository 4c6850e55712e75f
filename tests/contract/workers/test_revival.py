"""A request that was parked goes on after the tokens it has."""

from __future__ import annotations

import pytest

from penstock.queue.messages import Finish
from penstock.queue.readers import Readers, Revival
from penstock.queue.token_log import emitted_tokens
from penstock.workers.simulated.tokens import expected_tokens
from tests.contract.workers.cluster import INGRESS, Cluster

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]


@pytest.mark.parametrize("sampling", [{}, {"seed": 7}], ids=["continued", "replayed"])
@pytest.mark.parametrize("rounds", [1, 3])
async def test_revived_requests_end_exactly(mixed: Cluster, sampling: dict[str, int], rounds: int) -> None:
    worker = mixed.add(held=True)
    mixed.dispatch()
    readers = Readers(mixed.client, mixed.settings, INGRESS)
    record = await mixed.send(sampling={"max_tokens": 60} | sampling)

    async def logged(tokens: int) -> bool:
        return len(emitted_tokens(await mixed.log.read(record.id))) >= tokens

    async def parked() -> bool:
        frames = await mixed.log.read(record.id)
        return bool(frames) and frames[-1].finish is Finish.ABORT

    async def ended() -> bool:
        frames = await mixed.log.read(record.id)
        return bool(frames) and frames[-1].finish is Finish.LENGTH

    for turn in range(1, rounds + 1):
        worker.engine.allow(3)
        while not await logged(turn):
            worker.engine.allow(1)
        await readers.cancel([record.id])
        worker.engine.allow(1)
        await mixed.until(parked, "it is parked")
        frames = await mixed.log.read(record.id)
        assert not frames[-1].tokens
        assert await readers.revive(record.id, len(frames) - 1, b"") is Revival.REVIVED
        await mixed.queue.publish(record)
    worker.engine.allow()
    await mixed.until(ended, "its end")
    assert emitted_tokens(await mixed.log.read(record.id)) == expected_tokens(record.token_ids(), 60)
    await mixed.drained()
