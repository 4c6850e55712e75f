"""Dispatchers that die, and the replacement of everything."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tests.chaos.load import Load
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round, greedy
from tests.chaos.row import Row
from tests.chaos.rows.engines import SPLIT
from tests.support.simulated_stack import Shape

KILL_EVERY_S = 0.5
"""At most: what happens when none of them lives long."""
REEXECUTED = 0.01
"""Share of requests that may run twice because their dispatcher died."""
FAST = Shape(
    prefill=0,
    decode=0,
    mixed=2,
    dispatchers=4,
    profile="instant",
    limits={"max_num_seqs": 256, "max_num_batched_tokens": 8192, "num_gpu_blocks_override": 16384, "block_size": 16},
)


async def consumer_kill(round_: Round) -> None:
    """Kill the dispatcher that has been there longest, every half second or as soon as another has got something done:
    on a slow machine none would ever come to work otherwise."""

    async def faults(load: Load) -> None:
        while not load.over.is_set():
            await round_.sleep(round_.rng.uniform(0.05, KILL_EVERY_S))
            await load.progressed(1)
            victim = round_.stack.of_kind("dispatcher")[0]
            await round_.inject(f"kill -9 {victim.name}", round_.stack.kill, victim)
            await asyncio.to_thread(round_.stack.add, "dispatcher")

    async with round_.load(sampling=greedy(round_.size.tokens), prompt=round_.prompt(20)) as load:
        await round_.steady(load, faults)
        audit = await round_.conclude(load)
    round_.outcome.check("", "re-executed at most 1%", audit.reexecuted <= REEXECUTED, f"{audit.reexecuted:.2%}")


async def rolling(round_: Round) -> None:
    """Replace every process by a successor, one after the other: nothing fails, nothing repeats."""

    async def faults(load: Load) -> None:
        for _ in range(round_.size.faults):
            for part in list(round_.stack.parts.values()):
                await load.progressed(round_.size.streams * 8)
                await round_.inject(f"replace {part.name}", round_.stack.replace, part)

    async with round_.load() as load:
        await round_.steady(load, faults)
        await round_.conclude(load)


ROWS = [
    Row(
        "consumer-kill",
        "dispatcher kill -9 every <= 500 ms",
        FAST,
        {
            Scale.TEST: Size(0, 256, 4, requests=3_000),
            Scale.SHORT: Size(0, 512, 4, requests=12_000),
            Scale.LONG: Size(0, 512, 4, requests=100_000),
        },
        consumer_kill,
    ),
    Row(
        "consumer-kill-kafka",
        "the same on Kafka, whose consumer groups rebalance all the time",
        replace(FAST, queue="kafka"),
        {
            Scale.TEST: Size(0, 256, 4, requests=600),
            Scale.SHORT: Size(0, 512, 4, requests=3_000),
            Scale.LONG: Size(0, 512, 4, requests=20_000),
        },
        consumer_kill,
    ),
    Row(
        "rolling",
        "rolling replacement of everything",
        SPLIT,
        {Scale.TEST: Size(1, 16, 128), Scale.SHORT: Size(2, 64, 256), Scale.LONG: Size(5, 64, 512)},
        rolling,
    ),
]
