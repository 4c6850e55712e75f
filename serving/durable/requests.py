"""An HTTP request as it is stored: all that is needed to render its answer again."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable

import msgspec

from penstock.queue.records import PriorityClass
from penstock.serving.context import NOTHING_SEEN, Outcome, RequestContext, Seen
from penstock.serving.durable.draws import Draws
from penstock.serving.edge.asgi import Scope


class StoredRequest(msgspec.Struct, kw_only=True):
    """One generating POST. ``body`` is what vLLM's handler is given, see :mod:`penstock.serving.durable.bodies`.

    ``stream`` and ``background`` are what the client asked for; ``n`` answers for each prompt, ``choices`` in all.
    Times are wall-clock milliseconds since the epoch.
    """

    stream_id: str
    tenant: str
    key_id: str
    path: str
    body: bytes
    external_id: str
    priority_class: PriorityClass
    accepted_ms: int
    deadline_ms: int
    content_type: str = "application/json"
    stream: bool = False
    background: bool = False
    model: str | None = None
    keyed: bool = False
    n: int = 1
    choices: int = 1
    tags: dict[str, str] = {}
    trace: dict[str, str] = {}

    @property
    def record_ids(self) -> list[str]:
        """Under which its engine requests go through queue and token log."""
        if self.choices == 1:
            return [self.stream_id]
        return [f"{self.stream_id}:{choice}" for choice in range(self.choices)]


def digest_of(path: str, body: bytes) -> str:
    """What tells two requests under one idempotency key apart."""
    return hashlib.sha256(path.encode() + b"\n" + body).hexdigest()


def context_of(
    stored: StoredRequest,
    *,
    attach: bool = True,
    skip: Seen | None = NOTHING_SEEN,
    grace_s: float | None = None,
    saved: Awaitable[None] | None = None,
    outcome: Outcome | None = None,
) -> RequestContext:
    """The context in which its answer is rendered. See :class:`RequestContext` for the options."""
    return RequestContext(
        tenant=stored.tenant,
        key_id=stored.key_id,
        priority_class=stored.priority_class,
        external_id=stored.external_id,
        deadline_ms=stored.deadline_ms,
        path=stored.path,
        body=stored.body,
        model=stored.model,
        stream=stored.stream,
        tags=stored.tags,
        trace=stored.trace,
        outcome=outcome or Outcome(),
        stream_id=stored.stream_id,
        accepted_ms=stored.accepted_ms,
        n=stored.n,
        choices=stored.choices,
        attach=attach,
        saved=saved,
        grace_s=None if stored.background else grace_s,
        draws=Draws(stored.stream_id, stored.accepted_ms / 1000),
        skip=skip,
    )


def scope_of(stored: StoredRequest, base: Scope) -> Scope:
    """The ASGI scope of the request as it came; connection and server are those of ``base``."""
    headers = {
        b"content-type": stored.content_type.encode("latin-1"),
        b"content-length": str(len(stored.body)).encode(),
        b"x-request-id": stored.external_id.encode(),
    }
    path = stored.path
    return dict(base) | {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": list(headers.items()),
    }
