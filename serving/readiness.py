"""Whether this ingress could serve a request now: what ``/ready`` asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import redis.asyncio

from penstock.queue.errors import NoCapacity, PenstockError
from penstock.queue.protocol import RequestQueue
from penstock.queue.redis_client import store_errors
from penstock.queue.registry import Registry

CHECK_TIMEOUT_S = 2.0
"""A part that answers later is as good as away; probes give up after a few seconds themselves."""
SERVING_ROLES = frozenset({"decode", "mixed"})
"""Roles that can finish a request; a prefill replica alone cannot."""


class Readiness:
    """``await readiness()`` -> what is missing, part by part; empty when ready."""

    def __init__(self, queue: RequestQueue, client: redis.asyncio.Redis, registry: Registry, pool: str) -> None:
        self._queue = queue
        self._client = client
        self._registry = registry
        self._pool = pool

    async def __call__(self) -> dict[str, str]:
        checks = {"queue": self._queue.ping(), "redis": self._redis(), "engine": self._engine()}
        answers = await asyncio.gather(*(_answer(check) for check in checks.values()))
        return {part: answer for part, answer in zip(checks, answers, strict=True) if answer}

    async def _redis(self) -> None:
        with store_errors():
            await self._client.ping()

    async def _engine(self) -> None:
        alive = (await self._registry.alive()).values()
        if not any(replica.pool == self._pool and replica.role in SERVING_ROLES for replica in alive):
            raise NoCapacity(f"no decode or mixed replica of pool {self._pool!r} is alive")


async def _answer(check: Awaitable[None]) -> str:
    try:
        await asyncio.wait_for(check, CHECK_TIMEOUT_S)
    except PenstockError as error:
        return str(error)
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_S:g} s"
    return ""
