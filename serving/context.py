"""What the edge knows of a request, for code that runs in the same task below vLLM's handlers.

Set by the edge before vLLM's app is called and inherited by every task the app starts for the request, so
that the engine client finds it in ``add_request_async``.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from penstock.queue.errors import PenstockError
from penstock.queue.messages import StreamError
from penstock.queue.records import PriorityClass
from penstock.serving.errors import stream_error


@dataclass(slots=True)
class Outcome:
    """How a request failed, told by whoever knows and rendered by the edge when vLLM ends the response.

    vLLM's error objects carry a status and a text only; this carries our code, and whether a retry can help.
    """

    error: StreamError | None = None

    def fail(self, error: PenstockError | StreamError) -> None:
        """Note why the request ends. The first reason stays; later ones are consequences."""
        if self.error is None:
            self.error = error if isinstance(error, StreamError) else stream_error(error)


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One HTTP request. ``deadline_ms`` is wall-clock milliseconds since the epoch, ``body`` the original
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


_current: ContextVar[RequestContext] = ContextVar("penstock_request")


def current() -> RequestContext:
    """The request being served.

    Raises:
        LookupError: called outside of a request.
    """
    return _current.get()


def enter(context: RequestContext) -> None:
    """Make ``context`` the current one for the rest of this task and all tasks it starts."""
    _current.set(context)
