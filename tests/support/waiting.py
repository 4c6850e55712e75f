"""Waiting on conditions instead of clocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.05


def eventually(condition: Callable[[], bool], within_s: float, what: str, poll_s: float = POLL_S) -> None:
    """Return as soon as ``condition()`` holds; fail with ``what`` when it does not within ``within_s``."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(poll_s)


async def eventually_async(condition: Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    """:func:`eventually` for a coroutine function."""
    deadline = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        await asyncio.sleep(POLL_S)


async def until_true(condition: Callable[[], bool], within_s: float, what: str) -> None:
    """:func:`eventually`, while this event loop goes on."""

    async def holds() -> bool:
        return condition()

    await eventually_async(holds, within_s, what)
