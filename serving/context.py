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
from penstock.serving.durable.draws import Draws
from penstock.serving.errors import stream_error
from penstock.serving.request import ClientRequest


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


@dataclass(slots=True)
class RequestContext:
    """A client's request, and how its answer is rendered this time."""

    request: ClientRequest
    outcome: Outcome = field(default_factory=Outcome)
    attach: bool = False
    """Rendered again, or for the first time elsewhere: the record may have been published."""
    skip: Seen | None = None
    """What the client has already; None: events are not numbered."""
    grace_s: float | None = 0.0
    """How long the generation goes on without its client; None: for ever."""
    saved: Awaitable[None] | None = None
    """To be waited for before anything is published: the request is being stored."""
    pace: Pace = field(default_factory=Pace)
    draws: Draws = field(init=False)
    """Where ids in the answer come from: the same each time it is rendered."""

    def __post_init__(self) -> None:
        self.draws = Draws(self.request.stream_id, self.request.accepted_ms / 1000)


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
