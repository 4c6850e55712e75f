"""Pulling from the queue no more than there is room for, class by class."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from penstock.queue.errors import TransientError
from penstock.queue.pauses import jittered
from penstock.queue.protocol import Bound, Budget, Delivery, RequestQueue

MAX_BATCH = 128
"""Requests in one pull: one script call for them takes about a millisecond."""
OUTAGE_PAUSE_S = 0.2
"""Pause before a loop that met an unavailable broker or Redis tries again."""

Bounds = tuple[Bound, ...]

log = structlog.get_logger()


class Puller:
    """Gives what it pulls to ``admit``; ``bounds`` tells the room there is now, by class in order of rank."""

    def __init__(self, queue: RequestQueue, bounds: Callable[[], Bounds], admit: Callable[[Delivery], None]) -> None:
        self._queue = queue
        self._bounds = bounds
        self._admit = admit
        self._changed = asyncio.Event()

    def look(self) -> None:
        """There may be more room now."""
        self._changed.set()

    async def run(self) -> None:
        """Pull for ever; anew whenever there is room for a class that there was none for."""
        while True:
            self._changed.clear()
            bounds = self._bounds()
            pulling = asyncio.create_task(self._pull(bounds)) if bounds[0].requests > 0 else None
            try:
                await self._until_more_room(bounds, pulling)
            finally:
                if pulling is not None:
                    pulling.cancel()
                    await asyncio.wait({pulling})

    async def _until_more_room(self, bounds: Bounds, pulling: asyncio.Task[None] | None) -> None:
        """Return when the pull is done, or could bring a class that it could not when it began."""
        while True:
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait({changed, pulling} if pulling else {changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if pulling is not None and pulling.done():
                pulling.result()
                return
            self._changed.clear()
            if any(now.requests > 0 >= then.requests for now, then in zip(self._bounds(), bounds, strict=True)):
                return

    async def _pull(self, bounds: Bounds) -> None:
        most = bounds[0]
        try:
            for delivery in await self._queue.pull(Budget(min(most.requests, MAX_BATCH), max(1, most.tokens), bounds)):
                self._admit(delivery)
        except TransientError as error:
            log.warning("pull_paused", error=str(error))
            await asyncio.sleep(jittered(OUTAGE_PAUSE_S))
