"""Who reads a request's tokens: several ingresses at once, one after the other, or for a while nobody.

``reply_to`` in ``{ns}req:{id}`` names the channels of all ingresses that read, blank-separated; the field
``left:{channel}`` says that this one reads no more, although it may be the one the record names. What nobody reads any
more is cancelled, so that it holds no GPU; that end can be taken back ("revived") as long as the log is kept, and the
generation goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, cast

import redis.asyncio

from penstock.queue.messages import TERMINAL, Finish, Frame, encode
from penstock.queue.redis_client import store_errors
from penstock.queue.scripts import script
from penstock.queue.settings import RedisSettings

_ABORT = encode(Frame(TERMINAL, [], finish=Finish.ABORT))


class Standing(StrEnum):
    """Where a request stood when a reader came; see ``attach.lua``."""

    UNKNOWN = "unknown"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


class Revival(StrEnum):
    """What became of an attempt to revive; see ``revive.lua``."""

    REVIVED = "revived"
    LIVE = "live"
    FINAL = "final"


class Progress(NamedTuple):
    """How far a request has got: its end is in the log, tokens are, and whether it was cancelled for good."""

    done: bool
    tokens: int
    final: bool


class Readers:
    """One ingress' say in who reads what; ``channel`` is where its frames are posted to."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings, channel: str) -> None:
        self._client = client
        self.channel = channel
        self._ns = settings.namespace
        self._lifetime_ms = settings.lifetime_s * 1000
        self._retention_ms = settings.retention_s * 1000
        self._attach = client.register_script(script("attach"))
        self._detach = client.register_script(script("detach"))
        self._revive = client.register_script(script("revive"))
        self._cancel = client.register_script(script("cancel"))
        self._note = client.register_script(script("note_published"))

    async def attach(self, ids: Sequence[str]) -> list[Standing]:
        """Have the frames of these requests posted here as well."""
        with store_errors():
            answer = await self._attach(args=(self._ns, self._lifetime_ms, self.channel, encode(ids)))
        return [Standing(standing.decode()) for standing in answer]

    async def detach(self, ids: Sequence[str]) -> list[str]:
        """Have no more frames posted here; returns the ids that nobody reads any more."""
        with store_errors():
            answer = await self._detach(args=(self._ns, self._lifetime_ms, self.channel, encode(ids)))
        return [id_.decode() for id_ in answer]

    async def cancel(self, ids: Sequence[str], *, final: bool = False) -> int:
        """Stop these wherever they are; returns how many were still live.

        ``final``: they can never be revived, and have ended when this returns unless an engine has them.
        """
        args = (self._ns, self._lifetime_ms, encode(ids), *((_ABORT, self._retention_ms) if final else ()))
        with store_errors():
            return int(await self._cancel(args=args))

    async def revive(self, request_id: str, position: int, instead: bytes) -> Revival:
        """Take back the cancellation at ``position`` of the log; ``instead`` is the frame without its end, or empty."""
        args = (self._ns, self._lifetime_ms, self.channel, request_id, position, instead)
        with store_errors():
            return Revival((await self._revive(args=args)).decode())

    async def note_published(self, ids: Sequence[str]) -> None:
        """Spare the next reader the publication: these are in the queue."""
        with store_errors():
            await self._note(args=(self._ns, self._lifetime_ms, encode(ids)))

    async def progress(self, ids: Sequence[str]) -> list[Progress]:
        """How far these have got."""
        pipeline = self._client.pipeline(transaction=False)
        for request_id in ids:
            pipeline.hmget(f"{self._ns}req:{request_id}", "done", "next", "final")
        with store_errors():
            answer = cast("list[list[bytes | None]]", await pipeline.execute())
        return [Progress(done is not None, int(tokens or 0), final is not None) for done, tokens, final in answer]
