"""The way past vLLM's application: what takes it, and what becomes of it when the client leaves or it cannot answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.serving.context import RequestContext, current, enter
from penstock.serving.edge.direct import Direct
from penstock.serving.handlers import Answer, Events
from penstock.serving.request import CHAT, ClientRequest
from tests.unit.serving.apps import EVENT_STREAM, Recorder, client_request
from tests.unit.serving.asgi_client import Client, Reply

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]
BODY = b'{"model": "m"}'


class Serving:
    """Stands for vLLM's serving objects: gives what it was told to, or waits for ever."""

    def __init__(self, answer: Answer | list[bytes] | None) -> None:
        self._answer = answer
        self.asked: list[ClientRequest] = []
        self.left = asyncio.Event()
        self.waits = False
        self.accepts = False

    def know(self, path: str) -> bool:
        return path == CHAT

    async def answer(self, asked: ClientRequest, scope: Any) -> Answer | Events | None:
        self.asked.append(asked)
        if self.accepts:
            current().outcome.accepted.set()
        if isinstance(self._answer, list):
            return self._events(self._answer)
        await self._wait()
        return self._answer

    async def _events(self, events: list[bytes]) -> Events:
        try:
            for event in events:
                yield event
            await self._wait()
        finally:
            self.left.set()

    async def _wait(self) -> None:
        try:
            if self.waits:
                await asyncio.Event().wait()
        finally:
            self.left.set()


async def ask(serving: Serving, app: Recorder, client: Client | None = None, **headers: str) -> Reply:
    enter(RequestContext(client_request(body=BODY)))
    client = client or Client(Direct(app, serving))  # type: ignore[arg-type]
    return await client.request("POST", CHAT, BODY, headers)


async def test_a_whole_answer() -> None:
    app, serving = Recorder(), Serving(Answer(200, b'{"id": 1}'))
    reply = await ask(serving, app)
    assert (reply.status, reply.body, reply.ended) == (200, b'{"id": 1}', True)
    assert reply.headers["content-type"] == "application/json"
    assert app.scopes == []


async def test_events_come_one_by_one() -> None:
    reply = await ask(Serving([b"data: 1\n\n", b"data: 2\n\n"]), Recorder())
    assert [message.get("body") for message in reply.messages[1:]] == [b"data: 1\n\n", b"data: 2\n\n", b""]
    assert reply.messages[0]["headers"] == EVENT_STREAM
    assert reply.ended


@pytest.mark.parametrize("accepted", [False, True])
async def test_what_it_cannot_answer_is_the_applications(accepted: bool) -> None:
    """With the whole body; and where it runs already, to follow that run instead of another."""
    app, serving = Recorder(), Serving(None)
    serving.accepts = accepted
    reply = await ask(serving, app)
    assert (reply.status, app.bodies) == (200, [BODY])
    assert current().attach is accepted


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"origin": "https://elsewhere"}])
async def test_what_only_the_application_knows(headers: dict[str, str]) -> None:
    app, serving = Recorder(), Serving(Answer(200, b"{}"))
    await ask(serving, app, **headers)
    assert (serving.asked, app.bodies) == ([], [BODY])


async def test_other_paths_are_the_applications() -> None:
    app = Recorder()
    await Client(Direct(app, Serving(None))).request("GET", "/v1/models")  # type: ignore[arg-type]
    assert [scope["path"] for scope in app.scopes] == ["/v1/models"]


@pytest.mark.parametrize("answer", [Answer(200, b"{}"), [b"data: 1\n\n"]])
async def test_a_client_that_leaves_ends_the_work(answer: Answer | list[bytes]) -> None:
    app, serving = Recorder(), Serving(answer)
    serving.waits = True
    client = Client(Direct(app, serving))  # type: ignore[arg-type]
    request = asyncio.create_task(ask(serving, app, client))
    if isinstance(answer, list):
        await client.reply.until_body_has(b"data: 1")
    client.go_away()
    reply = await request
    assert serving.left.is_set()
    assert not reply.ended
    assert app.scopes == []


async def test_an_error_in_mid_stream_is_raised() -> None:
    """The edge tells the client."""

    class Broken(Serving):
        async def _wait(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(Broken([b"data: 1\n\n"]), Recorder())


async def test_generators_are_closed() -> None:
    """Also where the connection broke while an event was being sent, and not while one was waited for."""
    serving = Serving([b"data: 1\n\n", b"data: 2\n\n"])
    enter(RequestContext(client_request(body=BODY)))

    async def send(message: Any) -> None:
        if message.get("body"):
            raise OSError("broken pipe")

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(OSError, match="broken pipe"):
        await Direct(Recorder(), serving)(scope, receive, send)  # type: ignore[arg-type]
    assert serving.left.is_set()
