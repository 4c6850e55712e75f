"""What the edge knows of a request, for code that runs in the same task below vLLM's handlers.

Set by the edge before vLLM's app is called and inherited by every task the app starts for the request, so
that the engine client finds it in ``add_request_async``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.queue.errors import PenstockError
from penstock.queue.messages import StreamError
from penstock.queue.records import PriorityClass, new_request_id, now_ms
from penstock.serving.durable.draws import Draws
from penstock.serving.errors import stream_error


@dataclass(slots=True)
class Outcome:
    """How a request fared, told by whoever knows and rendered by the edge when vLLM ends the response.

    vLLM's error objects carry a status and a text only; this carries our code, and whether a retry can help.
    ``accepted`` is set when the queue has acknowledged the request, or has known it before.
    """

    error: StreamError | None = None
    accepted: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, error: PenstockError | StreamError) -> None:
        """Note why the request ends. The first reason stays; later ones are consequences."""
        if self.error is None:
            self.error = error if isinstance(error, StreamError) else stream_error(error)


@dataclass(slots=True)
class Pace:
    """What the source of an answer does for its way out: ``before_waiting`` is called when the next output is not there
    yet."""

    before_waiting: Callable[[], Awaitable[None]] | None = None


class Seen(NamedTuple):
    """Events a client has: how many (of each choice), and their checksum where it is known."""

    counts: tuple[int, ...] = ()
    checksum: int | None = None


NOTHING_SEEN = Seen()


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One HTTP request. Times in ``_ms`` are wall-clock milliseconds since the epoch, ``body`` the original
    bytes.

    ``external_id`` is the client's ``X-Request-Id``, or the one the edge gave it; it need not be unique.
    ``trace`` holds the W3C ``traceparent`` and ``tracestate`` where the client sent them.
    """

    tenant: str
    key_id: str
    priority_class: PriorityClass
    external_id: str
    deadline_ms: int
    path: str
    body: bytes = b""
    model: str | None = None
    stream: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    trace: dict[str, str] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)
    stream_id: str = field(default_factory=new_request_id)
    accepted_ms: int = field(default_factory=now_ms)
    n: int = 1
    """Answers a prompt."""
    choices: int = 1
    """Answers in all: engine requests this exchange makes."""
    background: bool = False
    """Nobody needs to wait for the answer."""
    stored: bool = False
    """The answer can be asked for again."""
    attach: bool = False
    """Rendered again, or for the first time elsewhere: the record may have been published."""
    saved: Awaitable[None] | None = None
    """To be waited for before anything is published: the request is being stored."""
    grace_s: float | None = 0.0
    """How long the generation goes on without its client; None: for ever."""
    draws: Draws = field(default_factory=Draws)
    """Where ids in the answer come from."""
    pace: Pace = field(default_factory=Pace)
    skip: Seen | None = None
    """What the client has already; None: events are not numbered."""


_current: ContextVar[RequestContext] = ContextVar("penstock_request")


def current() -> RequestContext:
    """The request being served.

    Raises:
        LookupError: called outside of a request.
    """
    return _current.get()


def current_or_none() -> RequestContext | None:
    """The request being served, if there is one."""
    return _current.get(None)


def enter(context: RequestContext) -> None:
    """Make ``context`` the current one for the rest of this task and all tasks it starts."""
    _current.set(context)
