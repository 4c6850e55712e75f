"""Readers that went away: after a grace their requests are let go, and stopped where nobody else reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from penstock.queue.errors import StoreUnavailable
from penstock.queue.pauses import jittered
from penstock.queue.readers import Readers

TRIES = 30
RETRY_S = 1.0
"""On average. It is tried for half a minute, longer than Redis takes to restart. What is lost then wastes an engine's
time until the request's deadline; nobody waits for it."""

log = structlog.get_logger()


class Leaving:
    """Lets requests go, many in one call: a thousand clients may leave at once.

    Args:
        read_here: whether this ingress has another reader of a request; it stays then.
    """

    def __init__(self, readers: Readers, read_here: Callable[[str], bool]) -> None:
        self._readers = readers
        self._read_here = read_here
        self._due: dict[str, bool] = {}
        self._letting_go: asyncio.Task[None] | None = None

    def add(self, request_id: str, grace_s: float, *, stop: bool = True) -> None:
        """Let this request go after the grace; not ``stop``: it generates on, whether or not anybody reads."""
        if grace_s > 0:
            asyncio.get_running_loop().call_later(grace_s, self._let_go, request_id, stop)
        else:
            self._let_go(request_id, stop)

    def _let_go(self, request_id: str, stop: bool) -> None:
        if self._read_here(request_id):
            return
        self._due[request_id] = stop
        if self._letting_go is None or self._letting_go.done():
            self._letting_go = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._due:
            await asyncio.sleep(0)  # whoever leaves in this turn of the loop comes along
            due, self._due = self._due, {}
            await self._try(due)

    async def _try(self, due: dict[str, bool]) -> None:
        for attempt in range(1, TRIES + 1):
            ids = [id_ for id_ in due if not self._read_here(id_)]
            try:
                unread = await self._readers.detach(ids) if ids else []
                if stopped := [id_ for id_ in unread if due[id_]]:
                    await self._readers.cancel(stopped)
            except StoreUnavailable as error:
                log.warning("detach_failed", requests=len(ids), attempt=attempt, error=str(error))
                await asyncio.sleep(jittered(RETRY_S))
            else:
                return
