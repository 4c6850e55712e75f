"""The reading side of an ingress, against a writer it can see."""

from __future__ import annotations

import asyncio
import uuid

import redis

from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.messages import (
    Delivered,
    Finish,
    Frame,
    encode,
    lua_string,
)
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import Append, Dispatch, RequestLog, TokenWriter
from tests.support.waiting import eventually_async

CHANNEL = "ingress:test"
PATIENCE_S = 20
"""For what comes at once."""


class Ingress:
    """A reader at work, and an engine that writes what it reads."""

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.blocking = connect(settings)
        self.client = connect_async(settings)
        self.log = RequestLog(self.client, settings)
        self.reader = TokenReader(Mailbox(self.client, settings, CHANNEL), self.log)
        self.seen: dict[str, list[Frame]] = {}
        self._writer = TokenWriter(self.blocking, settings)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read, and return when Redis has the subscription."""
        self._task = asyncio.create_task(self._read())
        await self.subscribed()

    async def subscribed(self) -> None:
        async def seen() -> bool:
            return await self.subscribers() > 0

        await eventually_async(seen, PATIENCE_S, "Redis has the subscription")

    async def subscribers(self) -> int:
        try:
            ((_, count),) = await self.client.pubsub_numsub(self.settings.namespace + CHANNEL)
        except redis.ConnectionError:  # it is being restarted
            return 0
        return int(count)

    async def _read(self) -> None:
        async for batch in self.reader.batches():
            for item in batch:
                self.seen.setdefault(item.id, []).append(item.frame)
            self._changed.set()

    async def dispatch(self, request: str) -> None:
        self.blocking.set(f"{self.settings.namespace}replica:a", b"1")
        await self.log.dispatch("d", [Dispatch(request, 0, CHANNEL, "a", lua_string(encode({})), "t")])

    def emit(self, request: str, index: int, finish: Finish | None = None, count: int = 1) -> None:
        """Append one frame; token k of a stream is k."""
        frame = Frame(index, list(range(index, index + count)), finish=finish)
        step = Append(request, 1, index, count, lua_string(encode(frame)), finish is not None)
        assert self._writer.append([step]) == ["ok"]

    def emit_unheard(self, request: str, index: int, finish: Finish | None = None) -> None:
        """Append, but lose the message on the way: it goes to a channel nobody reads."""
        key = f"{self.settings.namespace}req:{request}"
        self.blocking.hset(key, "reply_to", "nowhere")
        self.emit(request, index, finish)
        self.blocking.hset(key, "reply_to", CHANNEL)

    def publish(self, *items: Delivered) -> None:
        """Put a message of our own on the line."""
        self.blocking.publish(self.settings.namespace + CHANNEL, encode(list(items)))

    async def until(self, request: str, tokens: int, *, ended: bool = False) -> list[Frame]:
        """Frames of one stream once that many tokens (and the end) are there."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._complete(request, tokens, ended):
                self._changed.clear()
                await self._changed.wait()
        frames = self.seen[request]
        assert [token for frame in frames for token in frame.tokens] == list(range(tokens))
        return frames

    def _complete(self, request: str, tokens: int, ended: bool) -> bool:
        frames = self.seen.get(request, [])
        finished = bool(frames) and frames[-1].finish is not None
        return sum(len(frame.tokens) for frame in frames) >= tokens and (finished or not ended)

    async def settled(self) -> None:
        """Everything published so far has been handled: a later stream's frame has come through, and what had to be
        read in the log was read."""
        for _ in range(2):
            marker = f"marker{uuid.uuid4().hex}"
            self.reader.open(marker)
            self.publish(Delivered(marker, Frame(0, [0], finish=Finish.STOP)))
            await self.until(marker, 1)
            await eventually_async(self._idle, PATIENCE_S, "no log is being read")

    async def _idle(self) -> bool:
        return not self.reader.busy

    def kill_connection(self) -> None:
        """What a fail-over or a broken network does to the subscription."""
        assert self.blocking.client_kill_filter(_type="pubsub") > 0

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            (result,) = await asyncio.gather(self._task, return_exceptions=True)
            assert isinstance(result, asyncio.CancelledError), result
        await self.client.aclose()
        self._writer.close()
        self.blocking.close()


async def opened_stream(ingress: Ingress, request: str = "r") -> None:
    ingress.reader.open(request)
    await ingress.dispatch(request)
