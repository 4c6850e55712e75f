"""The HTTP server of an ingress: how it begins to leave, and what makes it end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
import uvicorn

log = structlog.get_logger()


class Server(uvicorn.Server):
    """Open streams go on for a while after SIGTERM. Clients that are cut off then resume elsewhere, so nothing they
    read is stopped: ``leaving`` is called first."""

    def __init__(self, config: uvicorn.Config, leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._leaving = leaving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leaving()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn raises the signal again when it has stopped serving; nothing else would be closed then."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


async def serve_beside(server: uvicorn.Server, batch_work: asyncio.Task[None]) -> None:
    """Serve until SIGTERM, or until the work on batches has failed, and then raise what it failed of.

    An ingress without it would take in batches that nobody works on.
    """

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("batch_work_failed", exc_info=task.exception())
            server.should_exit = True

    batch_work.add_done_callback(ended)
    await server.serve()
    if batch_work.done():
        batch_work.result()
