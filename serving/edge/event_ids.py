"""Numbers the events of a stream, and passes over those a resuming client has already.

The ``id:`` of an event is its ordinal, from 1. Several choices interleave as the engines' steps happen to, so there
each choice counts by itself and the id is the vector of all counts (``12.9``; a third number counts the closing events
that belong to no choice). After a dash comes the checksum of all events so far (``12-1c291ca3``): a client that resumes
where the answer has become another one is told so, and never given the end of a different answer. The line goes into
the event's own block: official SDKs fail on blocks without ``data:``. Error events are not numbered: a client that
resumes after one is told again.
"""

from __future__ import annotations

import re
from struct import pack
from zlib import crc32

from penstock.queue.errors import StreamInterrupted
from penstock.serving.context import NOTHING_SEEN, Seen, current_or_none
from penstock.serving.edge.asgi import App, Message, Receive, Scope, Send, is_event_stream, with_headers
from penstock.serving.errors import InvalidField

STREAM_HEADER = b"x-stream-id"
_ERRORS = (b'data: {"error"', b"event: error\n")
_CHOICE = b'"choices":[{"index":'
_END = b"\n\n"
_ID = re.compile(r"(?P<counts>\d{1,15}(\.\d{1,15})*)(-(?P<checksum>[0-9a-f]{8}))?")
DIVERGED = "what this client has of the stream is no longer what the stream holds; send the request again"
MAX_HELD = 16 * 1024
"""Bytes collected at most before they are sent: a quarter of what the server takes without waiting."""


def parse_event_id(text: str) -> Seen:
    """What a ``Last-Event-ID`` says; nothing for an empty one. Raises :class:`InvalidField`."""
    if not text.strip():
        return NOTHING_SEEN
    found = _ID.fullmatch(text.strip())
    if found is None:
        raise InvalidField("Last-Event-ID must be an id this stream has shown.", "last-event-id")
    checksum = found["checksum"]
    return Seen(tuple(map(int, found["counts"].split("."))), None if checksum is None else int(checksum, 16))


class EventIds:
    """Works on requests whose context says so (``skip`` is not None); also names their stream in a header."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = current_or_none()  # none: probes, metrics and whatever else generates nothing
        seen = None if context is None else context.skip
        if context is None or seen is None:
            return await self._app(scope, receive, send)
        stream: _Stream | None = None

        async def numbered_send(message: Message) -> None:
            nonlocal stream
            if message["type"] == "http.response.start":
                if message["status"] < 400:
                    name = (STREAM_HEADER, context.request.stream_id.encode())
                    message["headers"] = with_headers(list(message["headers"]), [name])
                if is_event_stream(message):
                    stream = _Stream(send, _Numbering(context.request.choices, seen))
                    if context.request.choices == context.request.n:  # several generators would flush for one another
                        context.pace.before_waiting = stream.flush
                await send(message)
            elif stream is None:
                await send(message)
            else:
                await stream.pass_on(message, hold=context.pace.before_waiting is not None)

        try:
            return await self._app(scope, receive, numbered_send)
        except Exception:
            if stream is not None:
                await stream.flush()  # what was rendered before it broke
            raise


class _Stream:
    """Events on their way out. While more outputs are at hand they are collected and leave in one piece, as soon as
    the handler would wait for the next: sending costs more than rendering."""

    def __init__(self, send: Send, numbering: _Numbering) -> None:
        self._send = send
        self._numbering = numbering
        self._held: list[bytes] = []
        self._size = 0

    async def pass_on(self, message: Message, *, hold: bool) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        if body.startswith(_ERRORS):
            await self.flush()
            await self._send(message)
            return
        shown = self._numbering.pass_on(body) if body else b""
        self._held.append(shown)
        self._size += len(shown)
        if not more:
            message["body"] = b"".join(self._held)
            self._held, self._size = [], 0
            await self._send(message)
        elif not hold or self._size > MAX_HELD:
            await self.flush()

    async def flush(self) -> None:
        """Send what is held."""
        held, self._held, self._size = b"".join(self._held), [], 0
        if held:
            await self._send({"type": "http.response.body", "body": held, "more_body": True})


class _Numbering:
    """Counts and checksums of one stream."""

    def __init__(self, choices: int, seen: Seen) -> None:
        tracks = choices + 1
        self._choices = choices
        self._counts = [0] * tracks
        self._sums = [0] * tracks
        if len(seen.counts) > tracks:
            raise InvalidField("Last-Event-ID is not one of this stream.", "last-event-id")
        self._skip = [*seen.counts, *[0] * (tracks - len(seen.counts))]
        self._expected = seen.checksum
        self._sums_then = [0] * tracks
        self._rest = b""

    def pass_on(self, body: bytes) -> bytes:
        """What the client is to see of ``body``; an event that is not whole yet waits for the rest."""
        if not self._rest and body.endswith(_END) and body.find(_END) == len(body) - 2:
            return self._event(body)
        *events, self._rest = (self._rest + body).split(_END)
        return b"".join(self._event(event + _END) for event in events)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith((b"data:", b"event:")) or event.startswith(_ERRORS):
            return event
        track = 0 if self._choices == 1 else self._track(event)
        count = self._counts[track] = self._counts[track] + 1
        self._sums[track] = crc32(event, self._sums[track])
        if count <= self._skip[track]:
            self._compare(track, count)
            return b""
        return b"id: %b-%08x\n%b" % (self._id(), self._checksum(self._sums), event)

    def _compare(self, track: int, count: int) -> None:
        """Where everything the client has was rendered again, its checksum must be the client's."""
        if count < self._skip[track]:
            return
        self._sums_then[track] = self._sums[track]
        complete = all(count >= skip for count, skip in zip(self._counts, self._skip, strict=True))
        if complete and self._expected not in (None, self._checksum(self._sums_then)):
            raise StreamInterrupted(DIVERGED)

    def _checksum(self, sums: list[int]) -> int:
        return sums[0] if self._choices == 1 else crc32(pack(f"<{len(sums)}I", *sums))

    def _track(self, event: bytes) -> int:
        start = event.find(_CHOICE)
        if start < 0:
            return self._choices
        start += len(_CHOICE)
        end = event.find(b",", start)
        return int(event[start:end])

    def _id(self) -> bytes:
        if self._choices == 1:
            return b"%d" % self._counts[0]
        shown = self._counts if self._counts[-1] else self._counts[:-1]
        return b".".join(b"%d" % count for count in shown)
