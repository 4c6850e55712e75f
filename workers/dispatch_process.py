"""A dispatcher as a process of its own: inside a Ray Serve replica, or by itself without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import structlog
import uvloop

from penstock.queue.factory import open_queue
from penstock.queue.logs import configure_logging
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.workers.dispatcher import Dispatcher
from penstock.workers.settings import WorkerSettings

log = structlog.get_logger()


async def run_dispatcher(
    queue: QueueSettings, redis: RedisSettings, model: ModelSettings, workers: WorkerSettings
) -> None:
    """Dispatch until cancelled, then hand unfinished deliveries to other dispatchers.

    A dispatcher that met what it does not know ends its process: another is started, and the queue delivers again.
    """
    source, client = open_queue(queue, redis, model.pool), connect_async(redis)
    try:
        await Dispatcher(source, client, redis, workers, model.pool).run()
    except Exception:
        log.exception("dispatcher_failed")
        os._exit(1)
    finally:
        await source.close()
        await client.aclose()


async def _until_signalled() -> None:
    running = asyncio.create_task(run_dispatcher(QueueSettings(), RedisSettings(), ModelSettings(), WorkerSettings()))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with suppress(asyncio.CancelledError):
        await running


def main() -> None:
    """``penstock dispatcher``."""
    configure_logging("dispatcher")
    uvloop.run(_until_signalled())
