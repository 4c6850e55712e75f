"""What becomes of one line: the row it leaves in a result file, in OpenAI's shape."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from penstock.queue.errors import PenstockError
from penstock.serving.batches.model import Counters
from penstock.serving.edge.routes import Dialect
from penstock.serving.edge.shapes import error_body
from penstock.serving.errors import stream_error

Kind = Literal["output", "error"]
WAIT_STATUSES = frozenset({408, 409, 425, 429, 503})
"""The platform's doing, not the line's: it is tried again for as long as the window is open."""
RETRY_STATUSES = frozenset({500, 502, 504})
"""An engine's doing: it is tried again a few times."""
EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = ("batch_cancelled", "This request was not executed because the batch was cancelled.")


class Reply(NamedTuple):
    """The answer to one request, as a client would get it; names of headers are in lower case.

    ``records`` are the ids under which the queue has the request; none where it was refused before.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    records: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is an answer and not an error."""
        return 200 <= self.status < 300


class Answer(NamedTuple):
    """A finished line: ``at`` its place in the input, ``row`` its line of JSON, without a line feed, ``records`` what
    the token log has of it that need not be kept."""

    at: int
    kind: Kind
    row: bytes
    counters: Counters
    records: tuple[str, ...] = ()


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Chat, completions and responses in one."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


_body = msgspec.json.Decoder(_Body)


def answered(batch_id: str, index: int, custom_id: str, reply: Reply) -> Answer:
    """The line of a request that got an answer, good or bad."""
    body = _json(reply.body)
    response = {"status_code": reply.status, "request_id": reply.headers.get("x-request-id", ""), "body": body}
    row = _row(batch_id, index, custom_id, response, None)
    counters = _counters(reply.body) if reply.ok else Counters(failed=1)
    return Answer(index, "output" if reply.ok else "error", row, counters, reply.records)


def unanswered(batch_id: str, index: int, custom_id: str, code: str, message: str) -> Answer:
    """The line of a request that got no answer."""
    row = _row(batch_id, index, custom_id, None, {"code": code, "message": message})
    return Answer(index, "error", row, Counters(failed=1))


def refusal(error: PenstockError) -> Reply:
    """An error that was raised instead of answered."""
    return Reply(error.status, {}, error_body(Dialect.OPENAI, stream_error(error), ""))


def _row(batch_id: str, index: int, custom_id: str, response: Any, error: Any) -> bytes:
    request_id = f"batch_req_{batch_id.removeprefix('batch_')}-{index}"
    return msgspec.json.encode({"id": request_id, "custom_id": custom_id, "response": response, "error": error})


def _json(body: bytes) -> Any:
    """The body as it stands inside a row: untouched JSON on one line, or a text."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {
            "error": {"message": body.decode("utf-8", "replace"), "type": "server_error", "param": None, "code": None}
        }
    return value if b"\n" in body or b"\r" in body else msgspec.Raw(body)


def _counters(body: bytes) -> Counters:
    try:
        usage = _body.decode(body).usage or _Usage()
    except msgspec.ValidationError:
        usage = _Usage()
    into = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    out = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return Counters(
        completed=1,
        input_tokens=usage.prompt_tokens or usage.input_tokens,
        cached_tokens=into.cached_tokens or 0,
        output_tokens=usage.completion_tokens or usage.output_tokens,
        reasoning_tokens=out.reasoning_tokens or 0,
    )
