"""Batches by a coordinator that can be killed at every write."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import redis.asyncio

from penstock.queue.records import new_request_id, now_ms
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.coordinator import Coordinator, Parts
from penstock.serving.batches.inspection import Inspector
from penstock.serving.batches.model import Batch, BatchSpec, Status, new_batch_id
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.shares import Shares
from penstock.serving.batches.slots import FairSlots
from penstock.serving.batches.store import BatchStore
from penstock.serving.files.catalog import FileCatalog, FileMeta, new_file_id
from penstock.serving.files.objects import ObjectStore
from penstock.serving.files.orphans import MARKER
from penstock.serving.files.settings import FilesSettings
from tests.support.batch_server import CHAT, MODEL, Fleet, jsonl, line

LINES = 120
STORE_WRITES = ("transition", "commit", "close", "renew", "release")
OBJECT_WRITES = ("put", "delete")
CATALOG_WRITES = ("add", "unpin")


class Killed(Exception):
    """The process is gone."""


class Killer:
    """Counts writes; dies at the one with this number (from 0), ``after`` it took effect or before."""

    def __init__(self, at: int | None, after: bool = False) -> None:
        self.at = at
        self.after = after
        self.writes = 0
        self.dead = False

    def guard(self, target: Any, names: tuple[str, ...]) -> None:
        """Let every call of these methods pass here."""
        for name in names:
            setattr(target, name, self._guarded(getattr(target, name)))

    def _guarded(self, method: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Killed
            number, self.writes = self.writes, self.writes + 1
            if number == self.at and not self.after:
                self.dead = True
                raise Killed
            result = await method(*args, **kwargs)
            if number == self.at:
                self.dead = True
                raise Killed
            return result

        return call


class Bench:
    """One batch, and the means to have it coordinated by one process after the other."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, root: Path) -> None:
        self.client = client
        self.settings = settings
        self.root = root
        self.fleet = Fleet()
        self.batches = BatchSettings()
        self.slots = 16
        self.spec = self._spec()

    def _spec(self, window_ms: int = 3_600_000, metadata: dict[str, str] | None = None) -> BatchSpec:
        now = now_ms()
        return BatchSpec(
            id=new_batch_id(),
            tenant="t",
            key_id="k",
            endpoint=CHAT,
            input_file_id=new_file_id(),
            completion_window="1h",
            created_ms=now,
            expires_ms=now + window_ms,
            metadata=metadata,
            output_expires_after_s=3600,
        )

    def parts(self, killer: Killer | None = None) -> Parts:
        objects = ObjectStore(FilesSettings(root=str(self.root)))
        catalog = FileCatalog(self.client, self.settings, objects)
        store, shares = BatchStore(self.client, self.settings), Shares(self.client, self.settings)
        if killer:
            killer.guard(objects, OBJECT_WRITES)
            killer.guard(catalog, CATALOG_WRITES)
            killer.guard(store, STORE_WRITES)
        return Parts(store, catalog, self.fleet, FairSlots(self.slots), shares, self.batches, MODEL)

    async def begin(self, **options: Any) -> None:
        """A new batch; whatever ran for the last one has nothing to do with it."""
        self.fleet = Fleet()
        self.spec = self._spec(**options)
        content = jsonl([line(f"c{i}") for i in range(LINES)])
        inspector = Inspector(1 << 20, LINES)
        inspector.feed(content)
        parts = self.parts()
        inspection = msgspec.msgpack.encode(inspector.finish())
        file_id = self.spec.input_file_id
        await parts.catalog.objects.put(MARKER, b"its name")
        await parts.catalog.objects.put(file_id, content)
        await parts.catalog.add(
            FileMeta(id=file_id, tenant="t", filename="in", purpose="batch", size=len(content), created_ms=now_ms())
        )
        await parts.catalog.pin(file_id, self.spec.id)
        await parts.store.create(self.spec, inspection)

    async def coordinate(self, killer: Killer | None = None) -> None:
        """One process' life; it leaves nothing but what it wrote."""
        await self.client.delete(f"{self.settings.namespace}batch:{self.spec.id}:lease")
        parts, owner = self.parts(killer), new_request_id()
        assert await parts.store.acquire(self.spec.id, owner)
        try:
            await Coordinator(self.spec.id, owner, parts).run()
        except* Killed:
            assert killer is not None
            assert killer.dead

    def has_asked(self, lines: int) -> Callable[[], Awaitable[bool]]:
        async def holds() -> bool:
            return len(self.fleet.asked) >= lines

        return holds

    async def batch(self) -> Batch:
        found = await self.parts().store.load(self.spec.id)
        assert found is not None
        return found

    async def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        return [json.loads(row) for row in (await self.parts().catalog.objects.get(file_id)).splitlines()]

    async def check_all_answered(self) -> None:
        """Every line once, run once, nothing left behind."""
        batch = await self.batch()
        found = await self.rows(batch.output_file_id)
        assert batch.status is Status.COMPLETED
        assert sorted(row["custom_id"] for row in found) == sorted(f"c{i}" for i in range(LINES))
        assert (batch.counters.completed, batch.counters.failed, batch.total) == (LINES, 0, LINES)
        assert set(self.fleet.runs.values()) == {1}
        await self.check_clean(batch)

    async def check_clean(self, batch: Batch) -> None:
        kept = {MARKER, self.spec.input_file_id, batch.output_file_id, batch.error_file_id} - {None}
        assert {path.name for path in _files(self.root)} - _outputs_of_others(self.root, kept) == kept
        keys = [key.decode() async for key in self.client.scan_iter(f"*{self.spec.id}*")]
        assert keys == [f"{self.settings.namespace}batch:{self.spec.id}"]
        assert not await self.parts().store.open_batches()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _outputs_of_others(folder: Path, kept: set[str | None]) -> set[str]:
    """Files of earlier batches in this test: whole objects in the root, never parts or segments."""
    return {path.name for path in _files(folder) if path.parent == folder and "." not in path.name} - kept  # type: ignore[return-value]
