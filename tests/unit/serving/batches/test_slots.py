"""Slots are shared among tenants and never lost."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serving.batches.slots import FairSlots

pytestmark = pytest.mark.unit


async def _given_out(slots: FairSlots, count: int, waiting: list[str]) -> list[str]:
    """The big tenant has all slots and gives them back while these wait: who gets them."""
    order: list[str] = []

    async def work(tenant: str) -> None:
        await slots.acquire(tenant)
        order.append(tenant)

    for _ in range(count):
        await slots.acquire("big")
    working = [asyncio.create_task(work(tenant)) for tenant in waiting]
    await asyncio.sleep(0)
    for _ in range(count):
        slots.release("big")
    await asyncio.sleep(0)
    for task in working:
        task.cancel()
    await asyncio.wait(working)
    return order


def test_a_free_slot_goes_to_who_has_the_fewest() -> None:
    order = asyncio.run(_given_out(FairSlots(4), 4, ["big"] * 6 + ["small"] * 3))
    assert Counter(order) == {"small": 2, "big": 2}


def test_what_a_tenant_has_elsewhere_counts() -> None:
    slots = FairSlots(2)
    slots.elsewhere = {"big": 2}
    assert asyncio.run(_given_out(slots, 2, ["big"] * 2 + ["small"] * 2)) == ["small", "small"]
    assert slots.taken == {"small": 2}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=30))
def test_cancelled_or_not_every_slot_comes_back(count: int, workers: list[tuple[str, int, bool]]) -> None:
    async def run() -> None:
        slots, held, most = FairSlots(count), 0, 0

        async def work(tenant: str, turns: int) -> None:
            nonlocal held, most
            await slots.acquire(tenant)
            held += 1
            most = max(most, held)
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                held -= 1
                slots.release(tenant)

        tasks = []
        for tenant, turns, cancelled in workers:
            tasks.append(asyncio.create_task(work(tenant, turns)))
            await asyncio.sleep(0)
            if cancelled:
                tasks[len(tasks) // 2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most <= count
        for _ in range(count):  # all of them are free again
            await asyncio.wait_for(slots.acquire("d"), 1)

    asyncio.run(run())


def test_who_is_cancelled_while_waiting_gets_nothing() -> None:
    async def run() -> None:
        slots = FairSlots(1)
        await slots.acquire("a")
        waiting = [asyncio.create_task(slots.acquire("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # and before it notices, the slot comes back
        slots.release("a")
        await asyncio.wait_for(waiting[1], 1)
        assert waiting[0].cancelled()
        waiting[2].cancel()
        await asyncio.wait([waiting[2]])
        slots.release("a")
        await asyncio.wait_for(slots.acquire("b"), 1)

    asyncio.run(run())
