"""Requests that kill every engine that takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.chaos.load import Load, quantile
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round
from tests.chaos.row import Row
from tests.support.simulated_stack import LIMITS, Shape
from tests.support.waiting import POLL_S

POISON = 1000
"""Below the tokens that prompts are drawn from, so that none has it by chance."""
SHARE = 100
"""One request in so many is poison."""
ATTEMPTS = 3
"""Engines one request may kill: the default of ``workers.max_attempts``."""
SLOWER = 1.1
"""How much longer innocent requests may take at p99."""
FRAGILE = Shape(prefill=0, decode=0, mixed=3, dispatchers=2, limits=LIMITS | {"poison_token": POISON})


async def poison(round_: Round) -> None:
    """The same load without and with poison: what is poisoned is quarantined, and nothing else fails."""
    calm = await _calm(round_)
    async with round_.load(prompt=_prompts(round_)) as load:
        round_.restarts = True
        restarting = asyncio.create_task(_restart_engines(round_))
        try:
            await round_.steady(load, Load.finished)
        finally:
            restarting.cancel()
            await asyncio.gather(restarting, return_exceptions=True)
        doomed = [id_ for id_, stream in load.streams.items() if POISON in stream.record.token_ids()]
        audit = await round_.conclude(load, doomed=doomed)
        letters = [letter.record().id for letter in await load.dead_letters(len(load.streams))]
        innocent = [stream.took_s for id_, stream in load.streams.items() if id_ not in doomed]
    runs = max((audit.runs[id_] for id_ in doomed), default=0)
    errors = {load.streams[id_].error for id_ in doomed}
    ratio = quantile(innocent, 0.99) / calm
    outcome = round_.outcome
    outcome.injected = len(doomed)
    outcome.finished += len(doomed)
    outcome.check("I8", f"dead-lettered within {ATTEMPTS} attempts", 0 < runs <= ATTEMPTS, runs)
    outcome.check("I8", "all poison and nothing else is dead-lettered", sorted(letters) == sorted(doomed), letters)
    outcome.check("I8", "their clients are told", errors == {"engine_failed"}, errors)
    round_.figure("others' p99, times the calm one", ratio)
    round_.timing("I8", f"others' p99 at most {SLOWER} times as long", ratio <= SLOWER, ratio)


def _prompts(round_: Round) -> Callable[[int], list[int]]:
    """Every so manyth one, from the first on so that small rounds have some, is poison."""
    fresh = round_.prompt(80)
    return lambda number: [POISON, *fresh(number)] if number % SHARE == SHARE // 4 else fresh(number)


async def _calm(round_: Round) -> float:
    async with round_.load() as load:
        await load.run(2 * round_.size.streams)
        return quantile([stream.took_s for stream in load.streams.values()], 0.99)


async def _restart_engines(round_: Round) -> None:
    """What Ray Serve or a kubelet does: start another engine where one has died."""
    while True:
        for part in round_.stack.dead_parts():
            await asyncio.to_thread(round_.stack.kill, part)
            await asyncio.to_thread(round_.stack.add, part.kind)
        await asyncio.sleep(POLL_S)


ROWS = [
    Row(
        "poison",
        "1% poison requests",
        FRAGILE,
        {
            Scale.TEST: Size(0, 16, 96, requests=80),
            Scale.SHORT: Size(0, 32, 2048, requests=150),
            Scale.LONG: Size(0, 32, 2048, requests=1_000),
        },
        poison,
    )
]
