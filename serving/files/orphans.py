"""Objects in the file store that nothing leads to: what an upload or a batch that died half-way has left.

An object is named by its file's description, or read by a batch on which there is something to do; segments belong to
such a batch. What is neither, and has not changed for an age, is removed; one ingress an hour looks.

A Redis that is empty or the wrong one would make orphans of everybody's files. So a store and a Redis know each other
by a name that both keep, and nothing is removed where they differ.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import cast

import redis.asyncio

from penstock.queue.logs import get_logger
from penstock.queue.redis_client import store_errors
from penstock.queue.settings import RedisSettings
from penstock.serving.files.catalog import FileCatalog
from penstock.serving.files.objects import ObjectMissing

EVERY_S = 3600
"""How often one of all ingresses looks; listing a bucket of a million objects takes a minute or two."""
SECOND_LOOK_S = 60.0
"""What nothing leads to is looked at again after this time: a batch may be in the middle of being created."""
MARKER = "penstock-store"
_OURS = re.compile(r"(?P<owner>file-[0-9a-f]{32}|segments/(?P<batch>batch_[0-9a-f]{32}))(?=/|$)")
"""What is called otherwise was put there by somebody else."""
NO_MARKER = f"the file store has lost its object {MARKER!r}, or is not mounted here"
OTHERS = "the file store belongs to another Redis, or Redis has lost its data"
log = get_logger()

OpenBatches = Callable[[], Awaitable[list[tuple[str, str]]]]
"""Tenant and id of each batch on which there is something to do."""


class OrphanSweep:
    """Removes objects of at least ``age_s`` seconds that nothing leads to."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        settings: RedisSettings,
        catalog: FileCatalog,
        open_batches: OpenBatches,
        age_s: float,
        second_look_s: float = SECOND_LOOK_S,
    ) -> None:
        self._client = client
        self._ns = settings.namespace
        self._catalog = catalog
        self._open_batches = open_batches
        self._age_s = age_s
        self._second_look_s = second_look_s

    async def sweep(self) -> int:
        """Look, unless somebody did within the hour; returns how many names were removed.

        Raises:
            StoreUnavailable, StorageUnavailable: Redis or the file store is away.
        """
        with store_errors():
            ours = await self._client.set(f"{self._ns}files-sweeper", "1", nx=True, ex=EVERY_S)
        if not ours or not await self._known():
            return 0
        orphans = await self._orphans(await self._old())
        if orphans:
            await asyncio.sleep(self._second_look_s)
            orphans = await self._orphans(orphans)
        for name in orphans:
            await self._catalog.objects.delete(name)
            log.info("orphan_removed", object=name)
        return len(orphans)

    async def _known(self) -> bool:
        """Whether this store goes with this Redis; a new one does from now on."""
        key, objects = f"{self._ns}files-store", self._catalog.objects
        kept, new = None, False
        with suppress(ObjectMissing):
            kept = await objects.get(MARKER)
        with store_errors():
            if kept is None:
                new = bool(await self._client.set(key, uuid.uuid4().hex, nx=True))
            expected = cast(bytes, await self._client.get(key))
        if new:
            await objects.put(MARKER, expected)
        elif kept is None or kept != expected:
            log.warning("orphans_not_swept", reason=NO_MARKER if kept is None else OTHERS)
        return kept is not None and kept == expected

    async def _old(self) -> list[str]:
        """Names of files, and of folders of segments, in which nothing has changed for long."""
        newest: dict[str, float] = {}
        for name, changed in await self._catalog.objects.names():
            if (ours := _OURS.match(name)) is not None:
                newest[ours["owner"]] = max(newest.get(ours["owner"], 0.0), changed)
        limit = time.time() - self._age_s
        return [name for name, changed in newest.items() if changed <= limit]

    async def _orphans(self, names: Iterable[str]) -> list[str]:
        working = {batch_id for _, batch_id in await self._open_batches()}
        batches = {name: found["batch"] for name in names if (found := _OURS.match(name)) is not None}
        segments = [name for name, batch in batches.items() if batch is not None and batch not in working]
        files = [name for name, batch in batches.items() if batch is None]
        return segments + await self._catalog.unnamed(files, working)
