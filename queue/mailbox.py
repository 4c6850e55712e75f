"""Messages pushed to one process over Redis publish/subscribe, and the token reader an ingress builds on them.

Publish/subscribe has no memory, which is why it only ever carries copies of what a key holds: after every
(re)connection the reader is told that it may have missed something and reads the keys.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator

import redis
import redis.asyncio

from penstock.queue.errors import StoreUnavailable
from penstock.queue.messages import TERMINAL, Delivered, Frame, decode_delivered
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import RequestLog

RECONNECT_FIRST_S = 0.05
"""Redis restarts in well under a second; the first try comes early."""
RECONNECT_MAX_S = 2.0
"""Upper bound of the jittered back-off, so that a fleet of ingresses does not storm a Redis that comes back."""
PING_INTERVAL_S = 15.0
"""A half-open connection is noticed after twice this time; the kernel would take minutes."""


class Mailbox:
    """Subscription of one process to its own channel."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, channel: str) -> None:
        self.channel = channel
        self._client = client
        self._name = settings.namespace + channel

    async def messages(self) -> AsyncGenerator[bytes | None, None]:
        """Payloads as they come; ``None`` after each (re)connection: something may have been missed before it.

        That is when Redis has confirmed the subscription: what is published from then on arrives here. The client
        also reconnects by itself, and the new confirmation is all that shows it.
        """
        delay = RECONNECT_FIRST_S
        while True:
            pubsub = self._client.pubsub()
            try:
                await pubsub.subscribe(self._name)
                async for payload in self._receive(pubsub):
                    delay = RECONNECT_FIRST_S
                    yield payload
            except (redis.ConnectionError, redis.TimeoutError):
                await asyncio.sleep(delay * random.uniform(0.5, 1.5))
                delay = min(delay * 2, RECONNECT_MAX_S)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    @staticmethod
    async def _receive(pubsub: redis.asyncio.client.PubSub) -> AsyncIterator[bytes | None]:
        pinged = False
        while True:
            message = await pubsub.get_message(timeout=PING_INTERVAL_S)
            if message is None and pinged:
                raise redis.TimeoutError("no answer to a ping")
            pinged = message is None
            if message is None:
                await pubsub.ping()
            elif message["type"] == "subscribe":
                yield None
            elif message["type"] == "message":
                yield message["data"]


class _Cursor:
    """How far one stream has been read."""

    __slots__ = ("ended", "frames", "position")

    def __init__(self) -> None:
        self.frames = 0
        self.position = 0
        self.ended = False

    def take(self, frame: Frame) -> bool:
        """Advance over the next frame of the log; whether it was one not seen yet."""
        if self.ended or frame.index not in (TERMINAL, self.position):
            return False
        self.frames += 1
        self.position += len(frame.tokens)
        self.ended = frame.finish is not None
        return True

    def missed(self, frame: Frame) -> bool:
        """Whether frames before this one may not have been seen. An end without a position does not tell: look."""
        return not self.ended and (frame.index > self.position or frame.index == TERMINAL)


class TokenReader:
    """Frames of the open streams of one ingress: each once, in order, whatever the connection does."""

    def __init__(self, mailbox: Mailbox, log: RequestLog) -> None:
        self.channel = mailbox.channel
        self._mailbox = mailbox
        self._log = log
        self._open: dict[str, _Cursor] = {}

    def open(self, request_id: str) -> None:
        """Start following a stream. Call before its record is published."""
        self._open[request_id] = _Cursor()

    def close(self, request_id: str) -> None:
        """Stop following; unknown ids are ignored."""
        self._open.pop(request_id, None)

    async def batches(self) -> AsyncIterator[list[Delivered]]:
        """What arrived, one list a message (a message holds one engine step of all of this ingress' streams)."""
        async for payload in self._mailbox.messages():
            batch = await self._catch_up() if payload is None else await self._accept(decode_delivered(payload))
            if batch:
                yield batch

    async def _accept(self, arrived: list[Delivered]) -> list[Delivered]:
        accepted: list[Delivered] = []
        for item in arrived:
            cursor = self._open.get(item.id)
            if cursor is None:
                continue
            if cursor.missed(item.frame):
                accepted += await self._read_on(item.id, cursor)
            elif cursor.take(item.frame):
                accepted.append(item)
        return accepted

    async def _catch_up(self) -> list[Delivered]:
        caught: list[Delivered] = []
        for request_id, cursor in list(self._open.items()):
            caught += await self._read_on(request_id, cursor)
        return caught

    async def _read_on(self, request_id: str, cursor: _Cursor) -> list[Delivered]:
        frames = await self._read(request_id, cursor.frames)
        return [Delivered(request_id, frame) for frame in frames if cursor.take(frame)]

    async def _read(self, request_id: str, skip: int) -> list[Frame]:
        """Until Redis answers: a stream whose missed frames were given up would wait for ever."""
        while True:
            try:
                return await self._log.read(request_id, skip)
            except StoreUnavailable:
                await asyncio.sleep(RECONNECT_FIRST_S)
