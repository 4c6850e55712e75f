"""The token log: what engines emitted, by position, fenced by attempt.

Redis holds the truth about emitted tokens. ``{ns}tok:{id}`` is a list of frames; ``{ns}req:{id}`` a hash with the
running attempt, the next position, who reads (``reply_to``) and who dispatches. One Lua call per engine step appends
for the whole batch, refuses a stale attempt and any position but the next one, hands finished prefills to their decode
replica, and wakes each reader with a single message.

The log is the truth and the message only a hint that carries the data: a reader that missed one reads the log.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, cast

import msgspec
import redis
import redis.asyncio
import structlog

from penstock.queue.messages import Event, EventKind, Frame, decode_frame, encode, lua_string
from penstock.queue.redis_client import store_errors
from penstock.queue.scripts import script
from penstock.queue.settings import RedisSettings

log = structlog.get_logger()


class Append(msgspec.Struct, array_like=True, frozen=True):
    """One request's share of a step.

    ``frame`` and ``work`` are encoded, as :func:`lua_string`; ``hand_over`` names the decode replica for ``work``.
    ``back`` gives the request back to its dispatcher instead, with the kind of event that tells why.
    """

    id: str
    attempt: int
    index: int
    count: int
    frame: msgspec.Raw
    final: bool
    hand_over: str | None = None
    work: msgspec.Raw | None = None
    fence: int = 0
    back: str | None = None


class AppendStatus(StrEnum):
    """What became of an append. Everything but OK and LOST (nobody has the request now) tells the engine to drop the
    request; DONE because it was ended from outside, or because this append was sent twice; GAP because the log lost
    more than the writer could append again."""

    OK = "ok"
    DONE = "done"
    STALE = "stale"
    GAP = "gap"
    LOST = "lost"


class Dispatch(NamedTuple):
    """One request for one replica's inbox; ``next`` is how many tokens of it the dispatcher has seen in the log.

    ``force`` takes it away from a replica that still looks alive. ``attempt`` and ``deaths`` are those the dispatcher
    knows of; with deaths behind it, it is under suspicion until the log holds ``probation`` tokens. ``alone``: nothing
    else is put on this replica meanwhile.
    """

    id: str
    next: int
    reply_to: str
    replica: str
    work: msgspec.Raw
    tenant: str
    force: bool = False
    attempt: int = 0
    deaths: int = 0
    probation: int = 0
    alone: bool = False


class DispatchStatus(StrEnum):
    """What became of a dispatch; see ``dispatch.lua``."""

    OK = "ok"
    ADOPTED = "adopted"
    EMITTED = "emitted"
    DONE = "done"
    GIVEN_UP = "given_up"
    CANCELLED = "cancelled"
    NO_REPLICA = "no_replica"


class Dispatched(NamedTuple):
    """Answer to a :class:`Dispatch`: who runs which attempt, how many tokens the log holds, how many replicas were
    given the request so far, and how many of them ended or failed with it."""

    status: DispatchStatus
    attempt: int
    next: int
    replica: str
    runs: int
    deaths: int = 0


KEEP_S = 5.0
"""What was appended in this time is appended again over a new connection. ``appendfsync everysec`` may lose two seconds
(one, and one more while the disk is slow)."""
REFILL_BATCH = 2000
"""Entries appended again in one call: some ten milliseconds of Redis."""
_Judged = tuple[EventKind | None, int]
_STATUSES = {status.value.encode(): status for status in AppendStatus}


class TokenWriter:
    """The engine's end of the log: blocking, used by one writer thread.

    Holds a connection of its own and speaks to it directly: the client's pool, retries and callbacks would double the
    time per step for which the interpreter is kept from the engine.

    A connection that broke may mean that Redis restarted without its last second. So over a new one the appends of
    the last :data:`KEEP_S` come first; they change nothing where nothing was lost.

    Args:
        replica: the replica that writes, to be adopted by dispatchers where the log lost its dispatch.
    """

    def __init__(self, client: redis.Redis, settings: RedisSettings, replica: str = "") -> None:
        self._connection: Any = client.connection_pool.make_connection()  # redis-py leaves it untyped
        self._script = script("append")
        self._sha = hashlib.sha1(self._script.encode()).hexdigest()
        self._head = (settings.namespace, settings.retention_s * 1000, settings.lifetime_s * 1000)
        self._replica = replica
        self._kept: deque[tuple[float, Sequence[Append]]] = deque()
        self._missing: list[Append] = []

    def append(self, entries: Sequence[Append]) -> list[AppendStatus]:
        """Append a step (or several, coalesced, in order). Without entries: look whether the log is still there.

        Raises:
            StoreUnavailable: Redis did not answer. Whether the step was stored is unknown; appending it again is
                safe: what is there already is left as it is.
        """
        if not entries and not self._kept:
            return []
        with store_errors():
            answer = self._call(entries)
        self._keep(entries)
        return [_STATUSES[status] for status in answer]

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _keep(self, entries: Sequence[Append]) -> None:
        now = time.monotonic()
        self._kept.append((now, entries))
        while self._kept and self._kept[0][0] < now - KEEP_S:
            self._kept.popleft()
        if not any(kept for _, kept in self._kept):
            self._kept.clear()

    def _call(self, entries: Sequence[Append]) -> list[bytes]:
        """Send it, again over a new connection: sending an append twice does no harm."""
        try:
            return self._send(entries)
        except redis.ConnectionError as error:
            log.info("token_log_reconnects", error=str(error))
        return self._send(entries)

    def _send(self, entries: Sequence[Append]) -> list[bytes]:
        while self._missing:
            self._evaluate(self._missing[:REFILL_BATCH])
            del self._missing[:REFILL_BATCH]
        return self._evaluate(entries)

    def _evaluate(self, entries: Sequence[Append]) -> list[bytes]:
        command = ("EVALSHA", self._sha, 0, *self._head, encode(entries), self._replica)
        try:
            answer = self._exchange(*command)
        except redis.exceptions.NoScriptError:  # a restarted Redis has forgotten it
            self._exchange("SCRIPT", "LOAD", self._script)
            answer = self._exchange(*command)
        return cast(list[bytes], answer)

    def _exchange(self, *command: str | bytes | int) -> Any:
        """One command and its answer; the connection opens itself, again after an error."""
        try:
            self._connection.send_command(*command)
            return self._connection.read_response()
        except (redis.ConnectionError, redis.TimeoutError):
            self._connection.disconnect()
            self._missing = [entry for _, kept in self._kept for entry in kept]
            raise


class RequestLog:
    """The other end: dispatchers give out attempts, ingresses read and cancel."""

    def __init__(self, client: redis.asyncio.Redis, settings: RedisSettings) -> None:
        self._client = client
        self._ns = settings.namespace
        self._retention_ms = settings.retention_s * 1000
        self._lifetime_ms = settings.lifetime_s * 1000
        self._dispatch = client.register_script(script("dispatch"))
        self._finish = client.register_script(script("finish"))
        self._cancel = client.register_script(script("cancel"))
        self._reset = client.register_script(script("reset"))

    async def dispatch(self, dispatcher: str, entries: Sequence[Dispatch]) -> list[Dispatched]:
        """Take the next attempt for each and put the work into its replica's inbox, all in one call."""
        with store_errors():
            answer = await self._dispatch(args=(self._ns, self._lifetime_ms, dispatcher, encode(entries)))
        return [
            Dispatched(DispatchStatus(status.decode()), attempt, next_, replica.decode(), runs, deaths)
            for status, attempt, next_, replica, runs, deaths in answer
        ]

    async def finish(self, entries: Iterable[tuple[str, str, Frame]]) -> list[bool]:
        """End requests (id, reply_to, last frame) from outside an engine; False where the end was there already."""
        batch = [(id_, reply_to, lua_string(encode(frame))) for id_, reply_to, frame in entries]
        with store_errors():
            answer = await self._finish(args=(self._ns, self._retention_ms, encode(batch)))
        return [status == b"ended" for status, _ in answer]

    async def give_up(self, id_: str, reply_to: str, frame: Frame, attempt: int, most: int) -> _Judged:
        """End one for the dead letters, if ``most`` replicas or more died or failed with it, and ``attempt`` is still
        the last. Returns how it stands now (GIVEN_UP, DONE, or None: it was kept), and how many did."""
        entry = (id_, reply_to, lua_string(encode(frame)), attempt, most)
        with store_errors():
            ((status, deaths),) = await self._finish(args=(self._ns, self._retention_ms, encode([entry])))
        return EventKind(status.decode()) if status else None, deaths

    async def cancel(self, ids: Sequence[str]) -> int:
        """Cancel wherever they are; returns how many were still live."""
        with store_errors():
            return int(await self._cancel(args=(self._ns, self._lifetime_ms, encode(ids))))

    async def reset(self, ids: Sequence[str]) -> None:
        """Forget what became of these, so that they can be published again and run from the beginning."""
        with store_errors():
            await self._reset(args=(self._ns, self._lifetime_ms, encode(ids)))

    async def read(self, request_id: str, skip: int = 0, limit: int = 0) -> list[Frame]:
        """Frames of one request in order, at most ``limit`` (0: all) after the first ``skip``; empty when it is unknown
        or expired."""
        key, last = f"{self._ns}tok:{request_id}", skip + limit - 1 if limit else -1
        with store_errors():
            frames = cast(list[bytes], await self._client.lrange(key, skip, last))
        return [decode_frame(frame) for frame in frames]

    async def positions(self, ids: Sequence[str]) -> dict[str, int]:
        """Tokens that the log holds of each; 0 of those it does not know."""
        pipeline = self._client.pipeline(transaction=False)
        for request_id in ids:
            pipeline.hget(f"{self._ns}req:{request_id}", "next")
        with store_errors():
            answer = await pipeline.execute()
        return {request_id: int(next_ or 0) for request_id, next_ in zip(ids, answer, strict=True)}

    async def states(self, attempts: Mapping[str, int]) -> list[Event]:
        """Where each of these requests stands, as events, for a dispatcher that may have missed the messages.

        Ask only for requests that were dispatched, with the attempt that is known: one that Redis knows less of is
        GONE. One that is between two replicas has no event.
        """
        pipeline = self._client.pipeline(transaction=False)
        for request_id in attempts:
            pipeline.hmget(f"{self._ns}req:{request_id}", "attempt", "done", "lost", "replica")
        with store_errors():
            answer = await pipeline.execute()
        return [
            Event(request_id, kind, int(fields[0] or 0), (fields[3] or b"").decode())
            for (request_id, known), fields in zip(attempts.items(), answer, strict=True)
            if (kind := _state(known, *fields)) is not None
        ]


def _state(
    known: int, attempt: bytes | None, done: bytes | None, lost: bytes | None, replica: bytes | None
) -> EventKind | None:
    if done is not None:
        return EventKind.GIVEN_UP if done == b"given_up" else EventKind.DONE
    if attempt is None or int(attempt) < known:
        return EventKind.GONE
    if lost is not None:
        return EventKind.LOST
    return None if replica is None else EventKind.PREFILLED


def emitted_tokens(frames: Iterable[Frame]) -> list[int]:
    """All tokens of a request's frames, in order."""
    return [token for frame in frames for token in frame.tokens]
