"""Who is let in, what is remembered for how long, and what happens while there are no keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.queue.errors import StoreUnavailable
from penstock.serving.edge.asgi import App
from penstock.serving.errors import Unauthorized, UnsafeBinding
from penstock.serving.tenants import (
    CACHE_TTL_S,
    DEFAULT_TENANT,
    Authenticator,
    is_loopback,
    open_authenticator,
)
from tests.unit.serving.apps import KEYS, MemoryKeys, Recorder
from tests.unit.serving.asgi_client import Client, get, post

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
Edge = Callable[..., App]
CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_answers_are_remembered_for_the_ttl_only() -> None:
    keys, clock = MemoryKeys(dict(KEYS)), Clock()
    authenticator = Authenticator(keys, open_mode=False, clock=clock)
    assert (await authenticator.authenticate("sk-a")).tenant == "acme"
    del keys.keys["sk-a"]
    assert (await authenticator.authenticate("sk-a")).tenant == "acme"
    assert keys.lookups == 1
    clock.now += CACHE_TTL_S
    with pytest.raises(Unauthorized):
        await authenticator.authenticate("sk-a")


async def test_known_keys_survive_a_short_absence_of_redis(keys: MemoryKeys) -> None:
    authenticator = Authenticator(keys, open_mode=False, clock=Clock())
    await authenticator.authenticate("sk-a")
    keys.away = True
    assert (await authenticator.authenticate("sk-a")).tenant == "acme"
    with pytest.raises(StoreUnavailable):
        await authenticator.authenticate("sk-b")


async def test_open_mode_ends_with_the_first_key() -> None:
    keys, clock = MemoryKeys({}), Clock()
    authenticator = Authenticator(keys, open_mode=True, clock=clock)
    assert (await authenticator.authenticate(None)).tenant == DEFAULT_TENANT
    assert (await authenticator.authenticate("whatever")).tenant == DEFAULT_TENANT
    keys.keys.update(KEYS)
    clock.now += CACHE_TTL_S
    with pytest.raises(Unauthorized):
        await authenticator.authenticate(None)
    assert (await authenticator.authenticate("sk-a")).tenant == "acme"


async def test_no_keys_and_not_open_lets_nobody_in() -> None:
    with pytest.raises(Unauthorized):
        await Authenticator(MemoryKeys({}), open_mode=False).authenticate("sk-a")


async def test_listening_to_the_network_needs_a_key(keys: MemoryKeys) -> None:
    with pytest.raises(UnsafeBinding, match="penstock keys create"):
        await open_authenticator(MemoryKeys({}), "0.0.0.0")
    with pytest.raises(Unauthorized):
        await (await open_authenticator(keys, "0.0.0.0")).authenticate(None)
    assert (await (await open_authenticator(MemoryKeys({}), "::1")).authenticate(None)).tenant == DEFAULT_TENANT


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
    ],
)
async def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer sk-b"}, {"authorization": "bearer  sk-b"}, {"x-api-key": "sk-b"}]
)
async def test_both_headers_are_accepted(edge: Edge, headers: dict[str, str]) -> None:
    app = Recorder()
    reply = await post(edge(app), CHAT, {}, headers)
    assert (reply.status, app.seen.tenant) == (200, "blue")


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer sk-z"}, {"authorization": "Basic sk-a"}, {"x-api-key": ""}]
)
async def test_strangers_get_401_in_openai_shape(edge: Edge, headers: dict[str, str]) -> None:
    app = Recorder()
    reply = await post(edge(app), CHAT, {}, headers)
    assert reply.status == 401
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert not app.scopes


async def test_strangers_get_401_in_anthropic_shape(edge: Edge) -> None:
    reply = await post(edge(Recorder()), "/v1/messages", {}, {})
    assert (reply.status, reply.json()["error"]["type"]) == (401, "authentication_error")


async def test_redis_away_is_503(edge: Edge, keys: MemoryKeys) -> None:
    keys.away = True
    reply = await post(edge(Recorder()), CHAT, {}, {"authorization": "Bearer sk-a"})
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")


async def test_probes_metrics_and_preflights_need_no_key(edge: Edge, keys: MemoryKeys) -> None:
    keys.away = True
    app = Recorder()
    for path in ("/health", "/ready", "/metrics"):
        assert (await get(edge(app), path)).status == 200
    assert (await Client(edge(app)).request("OPTIONS", CHAT)).status == 200
    assert [scope["path"] for scope in app.scopes] == ["/metrics", CHAT]
