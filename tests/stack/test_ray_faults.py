"""Ray's own parts die under a steady load: the path of a token does not lead through them.

Engines are simulated, so that there are many streams and every token is known; Ray, Serve and Redis are real. The head
of the Ray is a node of its own with nothing of ours on it, and keeps its state in Redis.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.redis_client import connect_async
from penstock.queue.registry import Registry, Replica
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.workers.demo_model import demo_model_path
from tests.chaos.load import Audit, Load, quantile
from tests.chaos.round import VOCABULARY, mixed_sampling
from tests.support.ray_node import DONE
from tests.support.ray_nodes import START_S, RayNodes
from tests.support.simulated_stack import LIMITS, MODEL, STEPS
from tests.support.waiting import eventually, eventually_async

pytestmark = [pytest.mark.stack, pytest.mark.asyncio, pytest.mark.timeout(900)]

STREAMS = 16
TOKENS = 192
"""An answer takes one and a half seconds: short beside every fault, so that new requests meet it as well."""
ENGINES = 4
"""Two prefill and two decode replicas."""
ENDED_S = 120.0
"""For what was accepted to end, and leases to be renewed, on a machine that is doing other things."""


@dataclass
class Running:
    """The application on its Ray."""

    ray: RayNodes
    redis: RedisSettings

    def serve(self, command: str, **changes: str) -> None:
        """Have Serve's client deploy the application, with these settings, or wait until it runs as it should."""
        words = [command, *(f"{name}={value}" for name, value in changes.items())]
        log = self.ray.folder / f"{command}.log"
        process = self.ray.process(command, "-m", "tests.support.serve_app", *words)
        process.start(lambda: process.alive)
        try:
            eventually(lambda: not process.alive, START_S, f"{command} is done; see {log}")
        finally:
            process.kill()
        assert log.read_text().splitlines()[-1] == DONE, f"see {log}"

    async def replicas(self) -> dict[str, Replica]:
        """Engines with a lease, by id."""
        async with connect_async(self.redis) as client:
            return await Registry(client, self.redis).alive()

    async def still(self, before: dict[str, Replica]) -> None:
        """The same engines have a lease; what was started again would have another id."""

        async def same() -> bool:
            return (await self.replicas()).keys() == before.keys()

        await eventually_async(same, ENDED_S, "the engines of before have their leases")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The application on a Ray of two nodes; all engines alive."""
    folder: Path = tmp_path_factory.mktemp("ray")
    redis = RedisServer(folder / "redis")
    environment = {
        "PENSTOCK_REDIS_URL": redis.url,
        "PENSTOCK_MODEL_PATH": str(demo_model_path()),
        "PENSTOCK_MODEL_NAME": MODEL,
        "PENSTOCK_MODEL_MAX_MODEL_LEN": "4096",
        "PENSTOCK_MODEL_ENGINE_ARGS": json.dumps(LIMITS),
        "PENSTOCK_WORKERS_ENGINE": "simulated",
        "PENSTOCK_WORKERS_STEP_PROFILE": STEPS,
        "PENSTOCK_WORKERS_PREFILL": "2",
        "PENSTOCK_WORKERS_DECODE": "2",
        "PENSTOCK_WORKERS_DISPATCHERS": "2",
        "PENSTOCK_WORKERS_MAX_ATTEMPTS": "1",  # whatever counts as a death of a replica fails its requests
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    with redis, RayNodes(folder, redis, environment) as ray:
        application = Running(ray, RedisSettings(url=redis.url))
        application.serve("deploy")
        assert not ray.on_head()
        yield application


@asynccontextmanager
async def steady(running: Running) -> AsyncIterator[Load]:
    """Requests all the time; afterwards each must have ended with its exact answer, and none have been run again for
    a death."""
    rng = iter(range(10**6))
    load = Load(
        QueueSettings(),
        running.redis,
        concurrency=STREAMS,
        prompt=lambda number: [VOCABULARY[(next(rng) * 31 + place) % len(VOCABULARY)] for place in range(80)],
        sampling=mixed_sampling(TOKENS),
    )
    async with load:
        sending = asyncio.create_task(load.run())
        try:
            await load.progressed(STREAMS * TOKENS)
            began = time.monotonic()
            yield load
            took_s = time.monotonic() - began
            await load.progressed(STREAMS * TOKENS)
            load.stop()
            await asyncio.wait_for(sending, ENDED_S)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        tally = load.tally
        assert not tally.errors
        assert (tally.lost, tally.repeated, tally.altered) == (0, 0, 0)
        assert tally.finished == tally.accepted > STREAMS
        audit = await load.audit()
        assert not audit.wrong
        _say(load, audit, took_s)


def _say(load: Load, audit: Audit, took_s: float) -> None:
    """What the streams saw, for whoever reads along (``-s``)."""
    streams = load.streams.values()
    gaps = [stream.gap_s for stream in streams]
    print(
        f"\n{took_s:.0f} s from the fault to order; {load.tally.accepted} requests, {audit.reexecuted:.1%} given to "
        f"more than one replica; first token after {max(stream.first_s for stream in streams):.2f} s at most; longest "
        f"silence in a stream p95 {quantile(gaps, 0.95):.2f} s, max {max(gaps):.2f} s"
    )


async def test_serve_controller_dies(running: Running) -> None:
    """[I1, I2] Streams go on, new requests are taken, and Serve finds the replicas that it had."""
    before = await running.replicas()
    assert len(before) == ENGINES
    first = running.ray.controller()
    async with steady(running) as load:
        running.ray.kill_controller()
        await load.progressed(2 * STREAMS * TOKENS)
        await asyncio.to_thread(running.serve, "settled")
    assert running.ray.controller() not in (0, first)
    await running.still(before)


async def test_head_dies(running: Running) -> None:
    """[I1, I2] With its state in Redis, the head comes back and finds node and replicas, which have worked on."""
    before = await running.replicas()
    async with steady(running) as load:
        await asyncio.to_thread(running.ray.kill_head)
        await load.progressed(4 * STREAMS * TOKENS)
        assert not running.ray.controller()
        await asyncio.to_thread(running.ray.start_head)
        await asyncio.to_thread(running.serve, "settled")
        await load.progressed(STREAMS * TOKENS)
    await running.still(before)


@pytest.mark.parametrize("surge", [0, 50])
async def test_rolling_update(running: Running, surge: int) -> None:
    """[I1, I2, I5] Serve replaces every replica by one with other settings, while all of them work; the new ones first,
    if it may."""
    before = await running.replicas()
    async with steady(running), taking_work(running) as counts:
        await asyncio.to_thread(
            running.serve,
            "deploy",
            PENSTOCK_WORKERS_SHORT_PROMPT_TOKENS=str(16 + surge),
            PENSTOCK_WORKERS_UPDATE_SURGE_PERCENT=str(surge),
        )
    after = await running.replicas()
    assert len(after) == ENGINES
    assert not after.keys() & before.keys()
    assert all(not psutil.pid_exists(replica.pid) for replica in before.values())
    assert (min(counts) == ENGINES) == (surge > 0)


@asynccontextmanager
async def taking_work(running: Running) -> AsyncIterator[list[int]]:
    """How many engines took new work, looked at again and again."""
    counts: list[int] = []

    async def count() -> bool:
        counts.append(sum(not replica.draining for replica in (await running.replicas()).values()))
        return False

    counting = asyncio.create_task(eventually_async(count, START_S, "the update is over"))
    try:
        yield counts
    finally:
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
