"""Errors in the shape each API's clients parse: OpenAI's, its Responses API's, and Anthropic's."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.queue.messages import StreamError
from penstock.serving.edge.routes import Dialect

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(dialect: Dialect, error: StreamError, request_id: str, param: str | None = None) -> bytes:
    """The body of an error response."""
    return msgspec.json.encode(_document(dialect, error, request_id, param))


def error_event(dialect: Dialect, error: StreamError, request_id: str) -> bytes:
    """The server-sent event that ends a stream with an error. The official SDKs raise ``APIError`` on it."""
    if dialect is Dialect.RESPONSES:
        event = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\ndata: " + msgspec.json.encode(event | {"sequence_number": 0}) + b"\n\n"
    data = b"data: " + error_body(dialect, error, request_id) + b"\n\n"
    return b"event: error\n" + data if dialect is Dialect.ANTHROPIC else data


def _document(dialect: Dialect, error: StreamError, request_id: str, param: str | None) -> dict[str, Any]:
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}
