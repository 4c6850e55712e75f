"""Redis connections with our timeouts, and its errors turned into ours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio

from penstock.queue.errors import StoreUnavailable
from penstock.queue.settings import RedisSettings

CONNECT_TIMEOUT_S = 2.0
"""A Redis on the same network answers in milliseconds; two seconds tell a restart from a slow link."""
COMMAND_TIMEOUT_S = 5.0
"""Longer than the longest script (a step of 1,000 streams takes a few ms) and any fsync stall worth waiting for."""
MAX_CONNECTIONS = 64
"""Of one asyncio client; Redis runs one command at a time anyway. A burst of more commands waits for them, where the
library's own pool would refuse the 101st, and with it a request."""

_REFUSED = re.compile(r"\b(OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN|BUSY)\b")
"""Codes of a server that will take the same command later; inside a script they come wrapped in other text."""


def connect(settings: RedisSettings) -> redis.Redis:
    """A blocking client for the threads of an engine replica."""
    return redis.Redis.from_url(
        settings.url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=COMMAND_TIMEOUT_S
    )


def connect_async(settings: RedisSettings) -> redis.asyncio.Redis:
    """An asyncio client for ingress and dispatcher."""
    return cancellable(pooled(settings, socket_timeout=COMMAND_TIMEOUT_S))


def pooled(settings: RedisSettings, **options: Any) -> redis.asyncio.Redis:
    """An asyncio client whose commands wait for one of :data:`MAX_CONNECTIONS` connections."""
    options |= {"max_connections": MAX_CONNECTIONS, "timeout": COMMAND_TIMEOUT_S}
    options["socket_connect_timeout"] = CONNECT_TIMEOUT_S
    return redis.asyncio.Redis.from_pool(redis.asyncio.BlockingConnectionPool.from_url(settings.url, **options))


class _CancellableWrites:
    """A connection whose writes can be cancelled.

    The client wraps each in ``asyncio.wait_for``, which up to Python 3.11 swallows a cancellation that comes just when
    the write is done: a loop that was told to end then runs on. ``asyncio.timeout`` does not, and costs no task.
    """

    socket_timeout: float | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        limit_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(limit_s):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError as error:
            raise redis.TimeoutError("Timeout writing to socket") from error
        finally:
            self.socket_timeout = limit_s


def cancellable(client: redis.asyncio.Redis) -> redis.asyncio.Redis:
    """The same client, for loops that end by cancellation."""
    pool = client.connection_pool
    pool.connection_class = type("CancellableConnection", (_CancellableWrites, pool.connection_class), {})
    return client


@contextmanager
def store_errors() -> Iterator[None]:
    """Raise :class:`StoreUnavailable` for whatever means that Redis did not answer or did not accept."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, redis.OutOfMemoryError, redis.ReadOnlyError) as error:
        raise StoreUnavailable(f"Redis is unavailable: {error}") from error
    except redis.ResponseError as error:
        if not _REFUSED.search(str(error)):
            raise
        raise StoreUnavailable(f"Redis does not accept writes: {error}") from error
