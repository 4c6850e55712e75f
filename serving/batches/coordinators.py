"""The batches an ingress works on: it takes those nobody has, seconds after their creation or a crash elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter

from prometheus_client import Gauge

from penstock.queue.errors import TransientError
from penstock.queue.logs import get_logger
from penstock.queue.records import new_request_id
from penstock.serving.batches.coordinator import Coordinator, Parts
from penstock.serving.batches.store import LeaseLost

LOOK_S = 1.0
"""How often it is looked for batches without a coordinator, and told what tenants have under way."""
STOP_S = 10.0
"""For committing what is finished when the ingress ends; then the process ends anyway, and another one reads those
answers from the token log again."""
RUNNING = Gauge("penstock_batches_running", "Batches this ingress coordinates.")
log = get_logger()


class Coordinators:
    """``run()`` until it is cancelled."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._owner = new_request_id()
        self._running: dict[str, tuple[str, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Take and coordinate batches for ever; gives all of them back when it is cancelled."""
        try:
            while True:
                try:
                    slots = self._parts.slots
                    slots.elsewhere = await self._parts.shares.exchange(self._owner, slots.taken)
                    await self._take()
                except TransientError as error:
                    log.warning("batches_unknown", error=str(error))
                await asyncio.sleep(LOOK_S)
        finally:
            await self._stop()

    async def _take(self) -> None:
        settings = self._parts.settings
        of_tenant = Counter(tenant for tenant, _ in self._running.values())
        for tenant, batch_id in _in_turns(await self._parts.store.open_batches()):
            if len(self._running) >= settings.max_coordinators:
                return
            if batch_id in self._running or of_tenant[tenant] >= settings.max_per_tenant:
                continue
            if await self._parts.store.acquire(batch_id, self._owner):
                of_tenant[tenant] += 1
                self._running[batch_id] = tenant, asyncio.create_task(self._coordinate(batch_id))

    async def _coordinate(self, batch_id: str) -> None:
        log.info("batch_taken", batch_id=batch_id)
        RUNNING.inc()
        try:
            await Coordinator(batch_id, self._owner, self._parts).run()
        except* LeaseLost as lost:
            log.warning("batch_lost", batch_id=batch_id, error=str(lost.exceptions[0]))
        except* Exception:
            log.exception("coordinator_failed", batch_id=batch_id)  # its lease runs out, and somebody tries again
        finally:
            RUNNING.dec()
            self._running.pop(batch_id, None)

    async def _stop(self) -> None:
        running = {batch_id: task for batch_id, (_, task) in self._running.items()}
        for task in running.values():
            task.cancel()
        if running:
            await asyncio.wait(running.values(), timeout=STOP_S)
        for batch_id in running:
            await self._parts.store.release(batch_id, self._owner)


def _in_turns(batches: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Round by round one of each tenant."""
    seen: Counter[str] = Counter()
    rounds = []
    for tenant, batch_id in batches:
        rounds.append((seen[tenant], tenant, batch_id))
        seen[tenant] += 1
    return [(tenant, batch_id) for _, tenant, batch_id in sorted(rounds)]
