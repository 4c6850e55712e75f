"""Request bodies as vLLM's handlers are given them.

Only bodies of ``/v1/responses`` are changed. Storing, background and conversations are Penstock's there, so those
fields go (vLLM would keep all that in one process' memory), and the response's id is made from the stream id, so that
it leads back to the stream.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.serving.durable.store import RESPONSE_PREFIX
from penstock.serving.request import CHAT, COMPLETIONS, RESPONSES

GENERATING = frozenset({CHAT, COMPLETIONS, RESPONSES, "/v1/messages"})
"""Paths whose POST generates."""

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode


def for_handler(path: str, body: bytes, stream_id: str, *, background: bool = False) -> bytes:
    """The body for vLLM's handler of ``path``. A background response is rendered as a stream, whoever asked for it."""
    if path != RESPONSES:
        return body
    fields = _fields(body)
    for field in ("background", "previous_response_id"):
        fields.pop(field, None)
    changes: dict[str, Any] = {"request_id": RESPONSE_PREFIX + stream_id, "store": False}
    return _encode(fields | changes | ({"stream": True} if background else {}))


def as_stream(body: bytes) -> bytes:
    """The same request, answered by events."""
    return _encode(_fields(body) | {"stream": True})


def following(body: bytes, earlier: bytes, output: list[dict[str, Any]]) -> bytes:
    """``body`` with the conversation so far before its own input: that of ``earlier``, and what it was answered."""
    fields = _fields(body)
    return _encode(fields | {"input": [*_input(_fields(earlier)), *output, *_input(fields)]})


def _input(fields: dict[str, Any]) -> list[Any]:
    given = msgspec.json.decode(fields.get("input", b'""'))
    return [{"role": "user", "content": given}] if isinstance(given, str) else list(given)


def _fields(body: bytes) -> dict[str, Any]:
    return dict(_object.decode(body))


def previous_response(body: bytes) -> str | None:
    """The response this one follows."""
    given = _fields(body).get("previous_response_id")
    name = None if given is None else msgspec.json.decode(given)
    return name if isinstance(name, str) else None
