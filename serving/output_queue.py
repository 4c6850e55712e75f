"""What vLLM's output processor puts in and a request's handler takes out: every output by itself.

vLLM's own collector merges what a slow handler has not taken yet, so that the events of a stream depend on timing. An
answer that can be rendered again must have the same events each time: those of the token log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from penstock.serving.context import current_or_none

FULL = 1024
"""Outputs that may wait for a slow client before its stream is no longer read ahead: about a megabyte."""
LOW = FULL // 4


class _Failure(NamedTuple):
    error: Exception
    tell: Callable[[], None]


class OutputQueue:
    """A queue with the interface of vLLM's ``RequestOutputCollector``."""

    def __init__(self, output_kind: object, request_id: str) -> None:
        self.request_id = request_id
        self._ready = asyncio.Event()
        self._outputs: deque[Any] = deque()
        self._context = current_or_none()
        self._when_low: list[Callable[[], None]] = []

    def put(self, output: Any) -> None:
        """Add an output, or the exception that ends the request."""
        self._outputs.append(output)
        self._ready.set()

    def fail(self, error: Exception, tell: Callable[[], None]) -> None:
        """End the request with ``error``; ``tell`` is called when the outputs before it have been taken."""
        self.put(_Failure(error, tell))

    async def get(self) -> Any:
        """The next output, once there is one."""
        if self._context is not None and self._context.pace.before_waiting is not None:
            await self._context.pace.before_waiting()
        while not self._outputs:
            self._ready.clear()
            await self._ready.wait()
        return self._take()

    def get_nowait(self) -> Any:
        """The next output, or None. An error is left to :meth:`get`, which lets out first what came before it."""
        if not self._outputs or isinstance(self._outputs[0], Exception | _Failure):
            return None
        return self._take()

    @property
    def full(self) -> bool:
        """Whether so much waits that no more should be read."""
        return len(self._outputs) > FULL

    def call_when_low(self, callback: Callable[[], None]) -> None:
        """Call it once there is room again."""
        self._when_low.append(callback)

    def _take(self) -> Any:
        output = self._outputs.popleft()
        if self._when_low and len(self._outputs) < LOW:
            callbacks, self._when_low = self._when_low, []
            for callback in callbacks:
                callback()
        if isinstance(output, _Failure):
            output.tell()
            raise output.error
        if isinstance(output, Exception):
            raise output
        if self._context is not None and output.outputs:
            self._context.draws.track = output.outputs[0].index  # ids drawn while it is rendered are this choice's
        return output

    def close(self) -> None:
        """Nobody takes any more."""
        self._outputs.clear()


def install() -> None:
    """Have vLLM use it, for the whole process."""
    from vllm.v1.engine import async_llm

    async_llm.RequestOutputCollector = OutputQueue
