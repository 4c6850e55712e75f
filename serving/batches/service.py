"""Files and batches of one ingress: their routes, and the work behind them."""

from __future__ import annotations

import asyncio
from functools import partial

import redis.asyncio

from penstock.queue.errors import PenstockError
from penstock.queue.logs import get_logger
from penstock.queue.settings import RedisSettings
from penstock.serving.batches.coordinator import Parts
from penstock.serving.batches.coordinators import Coordinators
from penstock.serving.batches.inspection import Inspector
from penstock.serving.batches.routes import BatchesApp
from penstock.serving.batches.runner import Backend
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.shares import Shares
from penstock.serving.batches.slots import FairSlots
from penstock.serving.batches.store import BatchStore
from penstock.serving.edge.asgi import App
from penstock.serving.files.catalog import FileCatalog
from penstock.serving.files.objects import ObjectStore
from penstock.serving.files.orphans import OrphanSweep
from penstock.serving.files.routes import FilesApp
from penstock.serving.files.settings import FilesSettings

SWEEP_S = 60.0
"""How often expired files are removed; they cannot be read any more from the moment they expire."""
log = get_logger()


class BatchService:
    """``wrap`` the application that serves everything else, and ``run`` beside it."""

    def __init__(
        self, client: redis.asyncio.Redis, redis_settings: RedisSettings, files: FilesSettings, batches: BatchSettings
    ) -> None:
        self._files = files
        self._batches = batches
        self._catalog = FileCatalog(client, redis_settings, ObjectStore(files))
        self._store = BatchStore(client, redis_settings)
        self._shares = Shares(client, redis_settings)
        self._orphans = OrphanSweep(
            client, redis_settings, self._catalog, self._store.open_batches, files.orphans_after_s
        )

    def wrap(self, app: App) -> App:
        """``app`` with ``/v1/files`` and ``/v1/batches``; callers must be authenticated outside of it."""
        batches = BatchesApp(app, self._store, self._catalog, self._files.expires_after_s)
        inspector = partial(Inspector, self._batches.max_line_bytes, self._batches.max_lines)
        return FilesApp(batches, self._catalog, self._files, inspector)

    async def run(self, backend: Backend, model: str) -> None:
        """Sweep expired files and work on batches until cancelled. ``model`` is the name that is served."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            if self._batches.coordinate:
                slots = FairSlots(self._batches.in_flight)
                parts = Parts(self._store, self._catalog, backend, slots, self._shares, self._batches, model)
                group.create_task(Coordinators(parts).run())

    async def _sweep(self) -> None:
        while True:
            try:
                while await self._catalog.sweep():
                    continue
                await self._catalog.objects.sweep()
                await self._orphans.sweep()
            except PenstockError as error:
                log.warning("sweep_failed", error=str(error))
            except Exception:
                log.exception("sweep_failed")  # whatever it is: the batches must go on
            await asyncio.sleep(SWEEP_S)
