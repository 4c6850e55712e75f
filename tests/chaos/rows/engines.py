"""Engines that die or are stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tests.chaos.load import Load, quantile
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round, mixed_sampling
from tests.chaos.row import Row
from tests.support.simulated_stack import Part, Shape
from tests.support.waiting import eventually_async

PATIENT = {"PENSTOCK_WORKERS_MAX_ATTEMPTS": "20"}
"""Engines die here a thousand times as often as in any fleet: a request that met three deaths is no poison."""
SPLIT = Shape(prefill=2, decode=3, settings=PATIENT)
LOADING = Shape(prefill=1, decode=2)
HAND_OVERS = 8
"""Requests that are on their way from prefill to decode when a prefill replica dies."""
HAND_OVER_S = 1.2
"""How long decode replicas may be held so that work piles up before them: well within their lease of 2 s."""
GAP_S = 5.0
"""Longest silence of a stream whose engine died, at p95, with another standing by."""
FAILS_EVERY = 16
GOODPUT = 0.8
"""Share of the fault-free rate that must be left when every so manieth transfer fails."""
NOTICED_S = 30.0
"""For others to see that a lease has run out, or is held again."""


async def decode_kill(round_: Round) -> None:
    """Kill decode replicas in the middle of their streams; one is always left standing by."""

    async def faults(load: Load) -> None:
        for _ in range(round_.size.faults):
            await load.progressed(round_.rng.randint(1, round_.size.streams * round_.size.tokens // 2))
            await round_.kill_engine("decode")

    async with round_.load(sampling=mixed_sampling(round_.size.tokens)) as load:
        await round_.steady(load, faults)
        audit = await round_.conclude(load)
        round_.hit(audit)
        again = [(load.streams[id_], runs) for id_, runs in audit.runs.items() if runs > 1]
    continued = [stream for stream, _ in again if "seed" not in stream.record.sampling]
    replayed = [(stream, runs) for stream, runs in again if "seed" in stream.record.sampling]
    # Who is hit again before it has caught up computes more than once within one silence.
    hit_once = [stream for stream, runs in replayed if runs == 2]
    gap = quantile([stream.gap_s for stream in continued], 0.95)
    waited = quantile([stream.waited_s() for stream in hit_once], 0.95)
    round_.figure("gap p95 s, continued", gap)
    round_.figure("gap p95 s, replayed", quantile([stream.gap_s for stream, _ in replayed], 0.95))
    round_.figure("replayed, hit once", len(hit_once))
    round_.figure("their gap p95 s, less what was computed anew", waited)
    round_.timing("", f"gap p95 < {GAP_S} s where a stream can be continued", gap < GAP_S, gap)
    round_.timing("", "and where it is replayed once, beyond the time that takes", waited < GAP_S, waited)


async def prefill_kill(round_: Round) -> None:
    """Kill a prefill replica whose KV was handed over and not yet read: decode is held still meanwhile."""

    async def faults(load: Load) -> None:
        while round_.outcome.injected < round_.size.faults:
            await load.progressed(round_.rng.randint(1, round_.size.streams * round_.size.tokens // 2))
            await _kill_between(round_, load)

    async with round_.load(sampling=mixed_sampling(round_.size.tokens), prompt=round_.prompt(400)) as load:
        await round_.steady(load, faults)
        await round_.conclude(load, kv=True)


async def _kill_between(round_: Round, load: Load) -> None:
    """Nothing is killed where no hand-over came in time: decode must not lose its leases."""
    await round_.enough("prefill", 2)
    held = round_.stack.of_kind("decode")
    for part in held:
        round_.stack.pause(part)
    try:
        streams = [await load.send() for _ in range(HAND_OVERS)]
        if not await round_.soon(lambda: load.sources(streams), HAND_OVER_S):
            return
        replicas = await asyncio.to_thread(round_.stack.replicas)
        sources = await load.sources(streams)
        victim = max(round_.stack.of_kind("prefill"), key=lambda part: sources[replicas[part.pid].id])
        round_.figure("hand-overs hit", sources[replicas[victim.pid].id])
        await round_.inject(f"kill -9 {victim.name}", round_.stack.kill, victim)
    finally:
        for part in held:
            round_.stack.wake(part)
    await asyncio.to_thread(round_.stack.add, "prefill")


async def kv_load_failure(round_: Round) -> None:
    """Every sixteenth KV transfer fails: computed again, at little cost."""
    long = round_.prompt(400)
    calm = await _goodput(round_, long)
    for part in round_.stack.of_kind("decode"):
        successor = await asyncio.to_thread(round_.stack.add_failing, "decode", FAILS_EVERY)
        await asyncio.to_thread(round_.stack.await_ready, [successor])
        await asyncio.to_thread(round_.stack.remove, part)
    share = await _goodput(round_, long, conclude=True) / calm
    round_.outcome.injected = sum(1 for _ in round_.stack.log_lines("kv_load_failed"))
    expected = round_.size.requests // FAILS_EVERY // 2  # some answers need no transfer, and some a second one
    round_.outcome.check("", f"at least {expected} transfers failed", round_.outcome.injected >= expected)
    round_.figure("goodput share", share)
    round_.timing("", f"goodput at least {GOODPUT:.0%} of fault-free", share >= GOODPUT, share)


async def _goodput(round_: Round, prompt: Callable[[int], list[int]], *, conclude: bool = False) -> float:
    """Requests per second, once engines have met each other and have taken their first, slow steps."""
    async with round_.load(prompt=prompt) as load:
        await load.run(2 * round_.size.streams)
    async with round_.load(sampling=mixed_sampling(round_.size.tokens), prompt=prompt) as load:
        started = time.monotonic()
        await round_.steady(load, Load.finished)
        rate = load.tally.finished / (time.monotonic() - started)
        if conclude:
            await round_.conclude(load)
    return rate


async def stopped(round_: Round) -> None:
    """SIGSTOP a decode replica, then a dispatcher, until others have taken over; then let it go on."""

    async def faults(load: Load) -> None:
        for turn in range(round_.size.faults):
            await load.progressed(round_.rng.randint(1, round_.size.streams * round_.size.tokens // 2))
            await round_.enough("decode", 2)
            victim = round_.rng.choice(
                await round_.busy("decode") if turn % 2 == 0 else round_.stack.of_kind("dispatcher")
            )
            await round_.inject(f"SIGSTOP {victim.name}", round_.stack.pause, victim)
            await round_.sleep(round_.size.seconds)
            await load.progressed(round_.size.streams * 8)  # by then its streams go on elsewhere
            round_.stack.wake(victim)
            await _back(round_, victim)

    before = sum(1 for _ in round_.stack.log_lines("append_refused"))
    async with round_.load(sampling=mixed_sampling(round_.size.tokens)) as load:
        await round_.steady(load, faults)
        round_.hit(await round_.conclude(load))
    refused = sum(1 for _ in round_.stack.log_lines("append_refused")) - before
    round_.figure("stale appends refused", refused)
    round_.outcome.check("I3", "what was stopped tried to go on, and was refused", refused > 0)


async def _back(round_: Round, part: Part) -> None:
    async def leased() -> bool:
        return part in await round_.leased(part.kind)

    if part.kind != "dispatcher":
        await eventually_async(leased, NOTICED_S, f"{part.name} has its lease back")


ROWS = [
    Row(
        "decode-kill",
        "decode kill -9",
        SPLIT,
        {Scale.TEST: Size(2, 32, 384), Scale.SHORT: Size(12, 64, 512), Scale.LONG: Size(50, 64, 512)},
        decode_kill,
        real={Scale.SHORT: Size(4, 16, 256), Scale.LONG: Size(50, 16, 256)},
    ),
    Row(
        "prefill-kill",
        "prefill kill -9 between prefill and read",
        SPLIT,
        {Scale.TEST: Size(2, 16, 128), Scale.SHORT: Size(12, 64, 512), Scale.LONG: Size(50, 64, 512)},
        prefill_kill,
        real={Scale.SHORT: Size(4, 8, 64), Scale.LONG: Size(50, 8, 64)},
    ),
    Row(
        "kv-load-failure",
        "KV load failure every 16th",
        LOADING,
        {
            Scale.TEST: Size(0, 16, 32, requests=64),
            Scale.SHORT: Size(0, 64, 128, requests=500),
            Scale.LONG: Size(0, 64, 256, requests=1_000),
        },
        kv_load_failure,
        real={Scale.SHORT: Size(0, 16, 32, requests=200), Scale.LONG: Size(0, 16, 32, requests=1_000)},
    ),
    Row(
        "stopped",
        "SIGSTOP of a decode replica or dispatcher",
        SPLIT,
        {
            Scale.TEST: Size(2, 16, 768, seconds=2.5),
            Scale.SHORT: Size(2, 64, 512, seconds=15),
            Scale.LONG: Size(4, 64, 512, seconds=60),
        },
        stopped,
    ),
]
