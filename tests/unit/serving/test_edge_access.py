"""One log line and the right counters for every request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.testing import LogCapture

from penstock.queue.errors import EngineFailed
from penstock.serving.edge import access
from penstock.serving.edge.asgi import App
from tests.unit.serving.apps import Failing, Recorder, Streaming, WaitForDisconnect
from tests.unit.serving.asgi_client import Client, get, post

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
AUTH = {"authorization": "Bearer sk-a"}
CHAT = "/v1/chat/completions"
Edge = Callable[..., App]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    capture = LogCapture()
    monkeypatch.setattr(access, "_log", structlog.wrap_logger(None, processors=[capture]))
    return capture.entries


def _count(route: str, status: str, priority_class: str) -> float:
    labels = {"route": route, "status": status, "priority_class": priority_class}
    return REGISTRY.get_sample_value("penstock_http_requests_total", labels) or 0.0


async def test_a_request_is_logged_whole(edge: Edge, lines: list[Any]) -> None:
    before = _count(CHAT, "500", "batch")
    body = {"service_tier": "flex", "model": "m"}
    await post(edge(Failing(EngineFailed("no"))), CHAT, body, AUTH | {"x-request-id": "r1"})
    (line,) = lines
    assert line.pop("duration_s") >= 0
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "r1",
        "tenant": "acme",
        "key_id": "key-1",
        "priority_class": "batch",
        "model": "m",
        "method": "POST",
        "path": CHAT,
        "status": 500,
        "stream": False,
        "error": "engine_failed",
    }
    assert _count(CHAT, "500", "batch") == before + 1


async def test_unknown_paths_share_one_label(edge: Edge, lines: list[Any]) -> None:
    before = _count("other", "404", "")
    for path in ("/a", "/b"):
        await get(edge(Recorder()), path, AUTH)
    assert _count("other", "404", "") == before + 2
    assert [line["path"] for line in lines] == ["/a", "/b"]


async def test_probes_are_counted_and_not_logged(edge: Edge, lines: list[Any]) -> None:
    before = _count("/health", "200", "")
    await get(edge(Recorder()), "/health")
    assert _count("/health", "200", "") == before + 1
    assert lines == []


async def test_strangers_are_counted(edge: Edge) -> None:
    name = "penstock_http_auth_failures_total"
    before = REGISTRY.get_sample_value(name) or 0.0
    await post(edge(Recorder()), CHAT, {}, {})
    assert REGISTRY.get_sample_value(name) == before + 1


async def test_a_client_that_goes_away_is_499(edge: Edge, lines: list[Any]) -> None:
    client = Client(edge(WaitForDisconnect()))
    client.go_away()
    await client.request("POST", CHAT, b"{}", AUTH)
    assert lines[0]["status"] == 499


async def test_open_streams_are_counted(edge: Edge, lines: list[Any]) -> None:
    name, seen = "penstock_http_streams_in_flight", []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        seen.append(REGISTRY.get_sample_value(name))

    before = REGISTRY.get_sample_value(name) or 0.0
    await post(edge(Streaming(chunks)), CHAT, {"stream": True}, AUTH)
    assert seen == [before + 1]
    assert REGISTRY.get_sample_value(name) == before
    assert lines[0]["stream"] is True
