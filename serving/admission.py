"""Admission: refuse new work when the queue is as long as it may get, before anything is accepted."""

from __future__ import annotations

import asyncio

import structlog

from penstock.queue.backlog import read_backlog
from penstock.queue.errors import NoCapacity
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import RedisSettings

REFRESH_S = 1.0
"""How old the backlog figure may be. The limit is a safety net against unbounded growth, not a scheduler."""

log = structlog.get_logger()


class Backlog:
    """The queue's length as its dispatchers last reported it, kept current by :meth:`watch`."""

    def __init__(self, limit: int, settings: RedisSettings, pool: str) -> None:
        self._limit = limit
        self._settings = settings
        self._pool = pool
        self._requests = 0

    def check(self, new: int) -> None:
        """Whether ``new`` more requests may be accepted.

        Raises:
            NoCapacity: the queue is full.
        """
        if self._requests + new > self._limit:
            raise NoCapacity(f"the queue is full ({self._requests} of {self._limit} requests); try again later")

    async def watch(self) -> None:
        """Refresh for ever."""
        client = connect_async(self._settings)
        while True:
            try:
                depth = await read_backlog(client, self._settings, self._pool)
                self._requests = sum(of_class.requests for of_class in depth.values())
            except Exception as error:  # an unreadable report as well: admission goes on with the last it knows
                log.warning("backlog_unknown", error=repr(error))
            await asyncio.sleep(REFRESH_S)
