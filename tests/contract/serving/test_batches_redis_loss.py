"""Redis comes back without what was written last, in the middle of a batch. [I1]

The coordinator lives on, or dies as well. Whatever is forgotten, every line ends once and is run once, and the files
are there: the append-only file is cut off where it ended some writes ago, as a host that loses power cuts it.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.records import new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.coordinator import Parts
from penstock.serving.batches.model import Status
from tests.contract.serving.bench import CATALOG_WRITES, STORE_WRITES, Bench, Killer

pytestmark = [pytest.mark.contract, pytest.mark.asyncio, pytest.mark.timeout(300)]
DURABLE_S = 0.5
"""In place of seconds."""
YOUNG_S = 0.25
"""Of what is older nothing is lost."""


class Outage:
    """Counts writes like a :class:`Killer`, and loses the latest of them after the one with this number."""

    def __init__(self, server: RedisServer, at: int | None, chance: random.Random, kills: Killer) -> None:
        self._server = server
        self._at = at
        self._chance = chance
        self._kills = kills
        self._sizes: list[tuple[float, int]] = []
        self.writes = 0
        self.lost = 0

    def guard(self, target: Any, names: tuple[str, ...]) -> None:
        for name in names:
            setattr(target, name, self._guarded(getattr(target, name)))

    def _guarded(self, method: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            number, self.writes = self.writes, self.writes + 1
            self._sizes.append((time.monotonic(), self._file().stat().st_size))
            result = await method(*args, **kwargs)
            if number == self._at:
                await asyncio.to_thread(self._happen)
                self._kills.dead = self._chance.random() < 0.3
            return result

        return call

    def _happen(self) -> None:
        self._server.kill()
        young = [size for at, size in self._sizes if time.monotonic() - at < YOUNG_S]
        size = self._file().stat().st_size
        kept = self._chance.choice([*young, size])
        self.lost = size - kept
        os.truncate(self._file(), kept)
        self._server.start()

    def _file(self) -> Path:
        folder = self._server.folder
        return max((*folder.glob("appendonlydir/*.incr.aof"), *folder.glob("appendonly.aof")), key=os.path.getmtime)


class LossyBench(Bench):
    """The outage hits the first coordinator."""

    outage: Outage | None = None

    def parts(self, killer: Killer | None = None) -> Parts:
        parts = super().parts(killer)
        if killer is not None and self.outage is not None:
            self.outage.guard(parts.store, STORE_WRITES)
            self.outage.guard(parts.catalog, CATALOG_WRITES)
        return parts


@pytest_asyncio.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[LossyBench, RedisServer]]:
    monkeypatch.setattr("penstock.serving.batches.results.SEGMENT_LINES", 25)
    monkeypatch.setattr("penstock.serving.batches.results.FLUSH_S", 0.01)
    monkeypatch.setattr("penstock.serving.batches.results.RETRY_S", 0.02)
    monkeypatch.setattr("penstock.serving.batches.coordinator.RETRY_S", 0.02)
    monkeypatch.setattr("penstock.serving.batches.coordinator.RENEW_S", 0.05)
    monkeypatch.setattr("penstock.serving.batches.coordinator.DURABLE_S", DURABLE_S)
    with RedisServer(tmp_path / "redis") as server:
        settings = RedisSettings(url=server.url, namespace=f"loss-{new_request_id()}:")
        async with connect_async(settings) as client:
            yield LossyBench(client, settings, tmp_path / "files"), server


async def test_redis_forgets_the_latest_writes(bench: tuple[LossyBench, RedisServer]) -> None:
    played, server = bench
    seed = int(os.environ.get("PENSTOCK_TEST_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    chance, lost = random.Random(seed), 0
    for at in range(24):
        await played.begin()
        await asyncio.sleep(YOUNG_S)  # the batch itself is on disk
        kills = Killer(None)
        played.outage = Outage(server, at, chance, kills)
        for _ in range(10):
            await _life(played, kills)
            kills = Killer(None)
            if (await played.batch()).status is Status.COMPLETED and not await played.parts().store.open_batches():
                break
        lost += played.outage.lost > 0
        await played.check_all_answered()
    assert lost > 5


async def _life(played: LossyBench, kills: Killer) -> None:
    try:
        await played.coordinate(kills)
    except* Exception as group:
        print(f"coordinator ended: {group.exceptions}")
    await played.client.connection_pool.disconnect()  # those to the server that is no more
