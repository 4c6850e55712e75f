"""Runs one line: asks, and asks again for as long as that can help."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from penstock.queue.errors import PenstockError, TransientError
from penstock.queue.logs import get_logger
from penstock.queue.records import PriorityClass
from penstock.serving.batches.answers import (
    RETRY_STATUSES,
    WAIT_STATUSES,
    Answer,
    Reply,
    answered,
    refusal,
)
from penstock.serving.batches.lines import RawLine
from penstock.serving.batches.model import BatchSpec
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.urgency import Urgency
from penstock.serving.errors import INTERNAL

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Pauses double from one try to the next, up to half a minute: a fleet that comes back is used soon, not stormed."""
URGE_S = 5.0
"""How often it is looked whether the batch has become urgent; windows are an hour at least."""
log = get_logger()


class LineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch. The same ``stream_id`` names the same run, whoever asks and however often.

    ``fresh``: nobody is known to have asked for it, which spares the search for an earlier run.
    """

    stream_id: str
    external_id: str
    tenant: str
    key_id: str
    path: str
    body: bytes
    priority_class: PriorityClass
    deadline_ms: int
    tags: dict[str, str]
    fresh: bool = False


class Backend(Protocol):
    """Runs requests as if clients had sent them."""

    async def respond(self, request: LineRequest) -> Reply:
        """The answer. Cancelling this stops nothing: whoever asks again finds the run."""

    async def urge(self, requests: Sequence[LineRequest]) -> None:
        """Move these up to the standard class; may be repeated. Raises :class:`TransientError`."""

    async def stop(self, requests: Sequence[LineRequest]) -> list[LineRequest]:
        """Stop these runs, also those that are not known yet; nobody will ask for them again. Returns those that had
        ended by themselves."""


class _Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


_line = msgspec.json.Decoder(_Line)


class LineRunner:
    """Runs the lines of one batch; those from ``fresh_from`` on for the first time."""

    def __init__(
        self, spec: BatchSpec, backend: Backend, settings: BatchSettings, urgency: Urgency, fresh_from: int = 0
    ) -> None:
        self._spec = spec
        self._backend = backend
        self._under_way: dict[int, LineRequest] = {}
        self._urged: set[int] = set()
        self._max_attempts = settings.max_attempts
        self._urgency = urgency
        self._fresh_from = fresh_from

    async def run(self, line: RawLine) -> Answer:
        """The line's result. Goes on until there is one; the window's end is the caller's."""
        parsed = _line.decode(line.data or b"")
        reply = await self._ask(line.at, bytes(parsed.body))
        del self._under_way[line.at]
        if line.at in self._urged:  # the copy in the batch class may come late: the log must tell that it is done
            reply = reply._replace(records=())
        self._urgency.finished()
        return answered(self._spec.id, line.at, parsed.custom_id, reply)

    async def stop(self) -> None:
        """Stop what was under way when :meth:`run` was cancelled."""
        if self._under_way:
            await self._backend.stop(list(self._under_way.values()))

    async def keep_urging(self) -> None:
        """When the batch becomes urgent, have what it has under way move up as well: all its slots may be waiting in a
        class whose turn never comes. Goes on for ever."""
        while True:
            await asyncio.sleep(URGE_S)
            if self._urgency.priority() is PriorityClass.STANDARD and (behind := self._behind()):
                self._urged |= behind
                with suppress(TransientError):
                    await self._backend.urge([self._under_way[index] for index in behind])

    def _behind(self) -> set[int]:
        """What was sent in the batch class, or may have been by somebody else."""
        requests = self._under_way.items()
        return {at for at, each in requests if not each.fresh or each.priority_class is PriorityClass.BATCH}

    async def _ask(self, index: int, body: bytes) -> Reply:
        """Each try has a stream id of its own, in the same order for everybody: who takes over finds earlier tries in
        the token log and comes to the one that was under way. What the queue has refused was no try: it left nothing
        to be found."""
        failures = tries = 0
        records: tuple[str, ...] = ()
        pause, fresh = FIRST_PAUSE_S, index >= self._fresh_from
        while True:
            request = self._under_way[index] = _request(self._spec, index, tries, body, self._urgency.priority(), fresh)
            reply = await self._try(request)
            failures += reply.status in RETRY_STATUSES
            records += reply.records
            if not _retryable(reply) or failures >= self._max_attempts:
                return reply._replace(records=records)
            log.warning("line_retried", batch_id=self._spec.id, line=index + 1, status=reply.status)
            tries += bool(reply.records)
            fresh = False  # the broker may have stored what it did not acknowledge
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_PAUSE_S)

    async def _try(self, request: LineRequest) -> Reply:
        try:
            return await self._backend.respond(request)
        except PenstockError as error:
            return refusal(error)
        except Exception:
            log.exception("line_failed", stream_id=request.stream_id)
            return refusal(INTERNAL)


async def stop_begun(spec: BatchSpec, backend: Backend, lines: Sequence[RawLine], max_tries: int) -> None:
    """Stop what another coordinator, that is gone, may have under way of these lines: of each the first try that has
    not ended."""
    requests = [_request(spec, line.at, 0, bytes(_line.decode(line.data or b"").body)) for line in lines]
    for tries in range(1, max_tries + 1):
        if requests:
            ended = await backend.stop(requests)
            requests = [msgspec.structs.replace(each, stream_id=_stream_id(each.stream_id, tries)) for each in ended]


def _stream_id(stream_id: str, tries: int) -> str:
    """That of the first try, or of any other, made that of this one."""
    first, _, _ = stream_id.partition("-r")
    return f"{first}-r{tries}" if tries else first


def _request(
    spec: BatchSpec,
    index: int,
    tries: int,
    body: bytes,
    priority_class: PriorityClass = PriorityClass.BATCH,
    fresh: bool = False,
) -> LineRequest:
    return LineRequest(
        stream_id=_stream_id(f"{spec.id}-{index}", tries),
        external_id=f"{spec.id.removeprefix('batch_')}-{index}",
        tenant=spec.tenant,
        key_id=spec.key_id,
        path=spec.endpoint,
        body=body,
        priority_class=priority_class,
        deadline_ms=spec.expires_ms,
        tags={"batch_id": spec.id},
        fresh=fresh,
    )


def _retryable(reply: Reply) -> bool:
    if reply.headers.get("x-should-retry") == "false":
        return False
    return reply.status in WAIT_STATUSES | RETRY_STATUSES
