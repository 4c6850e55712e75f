"""Whatever goes wrong, a client's SDK gets what it understands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from penstock.queue.errors import EngineFailed, QueueUnavailable, StreamInterrupted
from penstock.queue.messages import StreamError
from penstock.serving import context
from penstock.serving.edge.asgi import App
from tests.unit.serving.apps import AnswersError, Failing, Recorder, Streaming
from tests.unit.serving.asgi_client import get, post

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
AUTH = {"authorization": "Bearer sk-a"}
CHAT = "/v1/chat/completions"
Edge = Callable[..., App]


async def test_transient_error_becomes_503_that_may_be_retried(edge: Edge) -> None:
    reply = await post(edge(Failing(QueueUnavailable("no broker"))), CHAT, {}, AUTH)
    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert "x-should-retry" not in reply.headers
    assert reply.json() == {
        "error": {"message": "no broker", "type": "server_error", "param": None, "code": "queue_unavailable"}
    }


async def test_permanent_error_is_not_to_be_retried(edge: Edge) -> None:
    reply = await post(edge(Failing(EngineFailed("refused"))), CHAT, {}, AUTH)
    assert (reply.status, reply.headers["x-should-retry"]) == (500, "false")


async def test_anthropic_clients_get_their_own_shape(edge: Edge) -> None:
    reply = await post(edge(Failing(QueueUnavailable("no broker"))), "/v1/messages", {}, AUTH | {"x-request-id": "r1"})
    assert reply.json() == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "no broker"},
        "request_id": "r1",
    }


async def test_unexpected_exception_tells_the_request_id_and_nothing_else(edge: Edge) -> None:
    reply = await post(edge(Failing(RuntimeError("secret path"))), CHAT, {}, AUTH | {"x-request-id": "r1"})
    assert (reply.status, reply.headers["x-request-id"]) == (500, "r1")
    assert reply.json()["error"]["code"] == "internal_error"
    assert b"secret" not in reply.body


async def test_outcome_replaces_the_words_of_the_application(edge: Edge) -> None:
    reply = await post(edge(AnswersError(StreamInterrupted("engine died"), 500)), CHAT, {}, AUTH)
    assert (reply.status, reply.json()["error"]["code"]) == (502, "stream_interrupted")


async def test_stream_failing_before_its_first_event_gets_a_status(edge: Edge) -> None:
    async def fails_at_once() -> AsyncIterator[bytes]:
        context.current().outcome.fail(QueueUnavailable("no broker"))
        yield b'data: {"error": {"code": 503}}\n\n'
        yield b"data: [DONE]\n\n"

    reply = await post(edge(Streaming(fails_at_once)), CHAT, {"stream": True}, AUTH)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["error"]["code"] == "queue_unavailable"
    assert reply.ended


async def test_stream_failing_later_ends_with_our_error_and_done(edge: Edge) -> None:
    async def fails_later() -> AsyncIterator[bytes]:
        yield b'data: {"n": 1}\n\n'
        context.current().outcome.fail(StreamError("stream_interrupted", "engine died", 502))
        yield b'data: {"n": 2}\n\n'
        yield b'data: {"error": {"code": 500}}\n\n'
        yield b"data: [DONE]\n\n"

    reply = await post(edge(Streaming(fails_later)), CHAT, {"stream": True}, AUTH)
    assert reply.status == 200
    first, second, error, done = reply.body.split(b"\n\n")[:4]
    assert (first, second, done) == (b'data: {"n": 1}', b'data: {"n": 2}', b"data: [DONE]")
    assert b'"code":"stream_interrupted"' in error
    assert reply.ended


async def test_stream_that_raises_ends_in_the_shape_of_its_api(edge: Edge) -> None:
    async def raises() -> AsyncIterator[bytes]:
        yield b"event: response.created\ndata: {}\n\n"
        raise ValueError("a bug")

    reply = await post(edge(Streaming(raises)), "/v1/responses", {"stream": True}, AUTH)
    event = reply.body.split(b"\n\n")[1]
    assert event.startswith(b'event: error\ndata: {"type":"error","code":"internal_error"')
    assert reply.ended


async def test_stream_that_stops_without_telling_the_error_still_tells_it(edge: Edge) -> None:
    async def stops() -> AsyncIterator[bytes]:
        yield b'data: {"n": 1}\n\n'
        context.current().outcome.fail(EngineFailed("died"))

    reply = await post(edge(Streaming(stops)), CHAT, {"stream": True}, AUTH)
    assert b'"code":"engine_failed"' in reply.body


async def test_whole_answer_that_breaks_off_closes_the_connection(edge: Edge) -> None:
    async def breaks_off(scope: object, receive: object, send: Callable[..., object]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})  # type: ignore[misc]
        await send({"type": "http.response.body", "body": b"12345", "more_body": True})  # type: ignore[misc]
        raise RuntimeError("a bug")

    with pytest.raises(ConnectionError):
        await post(edge(breaks_off), CHAT, {}, AUTH)


@pytest.mark.parametrize("given", [None, "bad id\twith spaces", "x" * 129])
async def test_request_id_is_made_up_where_none_or_a_bad_one_is_given(edge: Edge, given: str | None) -> None:
    app = Recorder()
    reply = await post(edge(app), CHAT, {}, AUTH | ({"x-request-id": given} if given else {}))
    made = reply.headers["x-request-id"]
    assert made != given
    assert len(made) == 32
    assert app.seen.external_id == made
    assert (b"x-request-id", made.encode()) in app.scopes[0]["headers"]


async def test_probes_report_what_is_missing(edge: Edge) -> None:
    async def missing() -> dict[str, str]:
        return {"engine": "none is alive"}

    app = edge(Recorder(), missing=missing)
    assert (await get(app, "/health")).status == 200
    ready = await get(app, "/ready")
    assert (ready.status, ready.json()["missing"]) == (503, {"engine": "none is alive"})
    assert ready.headers["retry-after"] == "1"
    assert (await get(edge(Recorder()), "/ready")).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/pause",
        "/invocations",
        "/v1/load_lora_adapter",
        "/inference/v1/generate",
        "//v1/models",
    ],
)
async def test_paths_that_are_not_offered_do_not_exist(edge: Edge, path: str) -> None:
    app = Recorder()
    reply = await post(edge(app), path, {}, AUTH)
    assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
    assert not app.scopes
