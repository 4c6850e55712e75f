"""What a client asked for with one generating POST: all that is needed to render its answer, now or again."""

from __future__ import annotations

import hashlib

import msgspec

from penstock.queue.records import PriorityClass, new_request_id, now_ms
from penstock.serving.edge.asgi import Scope

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
"""The one path that takes several prompts."""
RESPONSES = "/v1/responses"


class ClientRequest(msgspec.Struct, kw_only=True):
    """One generating POST. It may be stored, so a field that is added needs a default.

    ``body`` is the client's, or what vLLM's handler is given instead (:mod:`penstock.serving.durable.bodies`).
    ``external_id`` is the client's ``X-Request-Id``, or the one the edge gave it; it need not be unique.
    ``stream``, ``background`` and ``store`` are what the client asked for; ``n`` answers for each prompt, ``choices``
    in all. ``keyed``: under an idempotency key. ``trace`` holds the W3C ``traceparent`` and ``tracestate``, if any.
    Times are wall-clock milliseconds since the epoch.
    """

    tenant: str
    key_id: str
    path: str
    body: bytes
    external_id: str
    priority_class: PriorityClass
    deadline_ms: int
    stream_id: str = msgspec.field(default_factory=new_request_id)
    accepted_ms: int = msgspec.field(default_factory=now_ms)
    content_type: str = "application/json"
    stream: bool = False
    background: bool = False
    store: bool = True
    model: str | None = None
    keyed: bool = False
    n: int = 1
    choices: int = 1
    tags: dict[str, str] = {}
    trace: dict[str, str] = {}

    @property
    def resumable(self) -> bool:
        """Whether its answer can be asked for again without an idempotency key."""
        return self.stream or (self.path == RESPONSES and self.store)

    @property
    def record_ids(self) -> list[str]:
        """Under which its engine requests go through queue and token log."""
        if self.choices == 1:
            return [self.stream_id]
        return [f"{self.stream_id}:{choice}" for choice in range(self.choices)]


def digest_of(path: str, body: bytes) -> str:
    """What tells two requests under one idempotency key apart."""
    return hashlib.sha256(path.encode() + b"\n" + body).hexdigest()


def scope_of(request: ClientRequest, base: Scope) -> Scope:
    """The ASGI scope of the request as it came; connection and server are those of ``base``."""
    headers = {
        b"content-type": request.content_type.encode("latin-1"),
        b"content-length": str(len(request.body)).encode(),
        b"x-request-id": request.external_id.encode(),
    }
    path = request.path
    return dict(base) | {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": list(headers.items()),
    }
