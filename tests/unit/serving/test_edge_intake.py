"""What the edge reads from a request, what it refuses, and that the application still sees all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.queue.records import PriorityClass, now_ms
from penstock.serving.edge.asgi import App
from penstock.serving.edge.intake import TIERS
from tests.unit.serving.apps import Recorder, WaitForDisconnect
from tests.unit.serving.asgi_client import Client, post

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
AUTH = {"authorization": "Bearer sk-a"}
CHAT = "/v1/chat/completions"
Edge = Callable[..., App]


async def test_context_reaches_the_application_with_the_body_untouched(edge: Edge) -> None:
    app = Recorder()
    body = b'{"model": "m", "stream": true, "metadata": {"team": "x", "none": null}, "messages": []}'
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    await post(edge(app), CHAT, body, AUTH | {"traceparent": trace, "tracestate": "v=1", "x-request-id": "mine"})
    seen = app.seen
    assert app.bodies == [body]
    assert seen.body == body
    assert (seen.tenant, seen.key_id, seen.external_id) == ("acme", "key-1", "mine")
    assert (seen.path, seen.model, seen.stream) == (CHAT, "m", True)
    assert seen.tags == {"team": "x"}
    assert seen.trace == {"traceparent": trace, "tracestate": "v=1"}


@pytest.mark.parametrize(("tier", "expected"), [*TIERS.items(), (None, PriorityClass.STANDARD)])
async def test_service_tier_chooses_the_class(edge: Edge, tier: str | None, expected: PriorityClass) -> None:
    app = Recorder()
    await post(edge(app), CHAT, {"service_tier": tier}, AUTH)
    assert app.seen.priority_class is expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"service_tier": "gold"}', "service_tier"),
        (b'{"service_tier": 3}', "service_tier"),
        (b'{"stream": "yes"}', "stream"),
        (b'{"metadata": {"n": 1}}', "metadata[...]"),
        (b'{"metadata": {"%s": "v"}}' % (b"k" * 65), "metadata"),
        (b"[]", None),
        (b"", None),
        (b'{"model": ', None),
        (b'{"x": ' + b"[" * 100_000, None),
    ],
)
async def test_bad_bodies_are_400_in_openai_shape(edge: Edge, body: bytes, param: str | None) -> None:
    app = Recorder()
    reply = await post(edge(app), CHAT, body, AUTH)
    assert reply.status == 400
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert not app.scopes


async def test_announced_length_over_the_limit_is_refused_unread(edge: Edge) -> None:
    client = Client(edge(Recorder(), max_body_bytes=1024))
    reply = await client.request("POST", CHAT, [b"{}"], AUTH | {"content-length": "1025"})
    assert (reply.status, reply.json()["error"]["code"]) == (413, "payload_too_large")


async def test_counted_length_over_the_limit_is_refused_whatever_was_announced(edge: Edge) -> None:
    client = Client(edge(Recorder(), max_body_bytes=1024))
    reply = await client.request("POST", CHAT, [b"x" * 600] * 2, AUTH | {"content-length": "10"})
    assert reply.status == 413


async def test_body_in_chunks_arrives_whole(edge: Edge) -> None:
    app = Recorder()
    await Client(edge(app)).request("POST", CHAT, [b'{"mo', b'del": ', b'"m"}'], AUTH)
    assert app.bodies == [b'{"model": "m"}']


async def test_client_that_breaks_off_never_reaches_the_application(edge: Edge) -> None:
    app = Recorder()
    reply = await Client(edge(app)).request("POST", CHAT, [b'{"mo'], AUTH, breaks_off=True)
    assert not app.scopes
    assert not reply.messages


async def test_application_hears_the_client_going_away(edge: Edge) -> None:
    app = WaitForDisconnect()
    client = Client(edge(app))
    client.go_away()
    await client.request("POST", CHAT, b"{}", AUTH)
    assert app.heard == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({}, {}, 3600),
        ({"x-request-timeout-ms": "1500"}, {}, 1.5),
        ({"x-request-timeout-ms": "99999999"}, {}, 3600),
        ({"x-stainless-read-timeout": "600"}, {}, 600),
        ({"x-stainless-read-timeout": "2.5"}, {}, 2.5),
        ({"x-stainless-read-timeout": "600"}, {"stream": True}, 3600),
        ({"x-stainless-read-timeout": "not given"}, {}, 3600),
        ({"x-request-timeout-ms": "1500", "x-stainless-read-timeout": "600"}, {}, 1.5),
        ({}, {"service_tier": "priority"}, 600),
    ],
)
async def test_deadline(edge: Edge, headers: dict[str, str], body: dict[str, object], seconds: float) -> None:
    app = Recorder()
    before = now_ms()
    await post(edge(app), CHAT, body, AUTH | headers)
    assert before <= app.seen.deadline_ms - seconds * 1000 <= now_ms()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", ""])
async def test_bad_timeout_header_is_refused(edge: Edge, value: str) -> None:
    reply = await post(edge(Recorder()), CHAT, {}, AUTH | {"x-request-timeout-ms": value})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "x-request-timeout-ms")


@pytest.mark.parametrize("trace", ["garbage", "00-" + "A" * 32 + "-" + "b" * 16 + "-01"])
async def test_malformed_trace_is_dropped(edge: Edge, trace: str) -> None:
    app = Recorder()
    await post(edge(app), CHAT, {}, AUTH | {"traceparent": trace, "tracestate": "v=1"})
    assert app.seen.trace == {}


async def test_other_content_types_are_left_to_the_application(edge: Edge) -> None:
    app = Recorder()
    await post(edge(app), CHAT, b"not json", AUTH | {"content-type": "text/plain"})
    assert app.bodies == [b"not json"]
