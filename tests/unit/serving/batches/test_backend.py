"""How the lines of batches are answered: without the application where that will do, and with it where not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from penstock.queue.messages import StreamError
from penstock.queue.records import PriorityClass
from penstock.serving.batches import backend
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.backend import InnerBackend
from penstock.serving.batches.lines import RawLine
from penstock.serving.batches.runner import LineRequest, LineRunner
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.context import RequestContext, current
from penstock.serving.durable.inner import InnerResponse
from penstock.serving.handlers import NOTED, Answer
from tests.unit.serving.batches.test_urgency import Clock, urgency

pytestmark = [pytest.mark.unit, pytest.mark.asyncio]

CHAT = "/v1/chat/completions"
DIRECT = b'{"answered": "by the handler"}'
WHOLE = b'{"answered": "by the application"}'


class Handlers:
    """Serving objects whose answers are given; None: it never comes."""

    def __init__(self, *answers: Answer | None) -> None:
        self.asked: list[RequestContext] = []
        self.left = 0
        self._answers = list(answers)

    def know(self, path: str) -> bool:
        return path == CHAT

    async def answer(self, asked: object, scope: object) -> Answer:
        context = current()
        self.asked.append(context)
        context.outcome.accepted.set()
        answer = self._answers.pop(0)
        if answer is NOTED:
            context.outcome.fail(StreamError("failed", "no luck", 500))
        if answer is not None:
            return answer
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1
        raise AssertionError("nobody sets this event")


class Application:
    """Answers everything."""

    def __init__(self) -> None:
        self.asked: list[RequestContext] = []

    async def respond(self, context: RequestContext) -> InnerResponse:
        self.asked.append(context)
        context.outcome.accepted.set()
        return InnerResponse(200, [(b"X-Request-Id", b"one")], WHOLE)


def request(path: str = CHAT, *, fresh: bool) -> LineRequest:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
    return LineRequest(
        stream_id="batch_1-0", external_id="one", tenant="t", key_id="k", path=path, body=body,
        priority_class=PriorityClass.BATCH, deadline_ms=0, tags={}, fresh=fresh,
    )  # fmt: skip


async def respond(handlers: Handlers, asked: LineRequest) -> tuple[Reply, Application]:
    application, nobody = Application(), None
    inner: Any = application
    return await InnerBackend(handlers, inner, nobody, nobody).respond(asked), application  # type: ignore[arg-type]


@pytest.mark.parametrize("fresh", [True, False])
async def test_an_answer_without_the_application(fresh: bool) -> None:
    """Only what may have run before is looked for. Its records are told: their logs are not needed any more."""
    handlers = Handlers(Answer(200, DIRECT))
    reply, application = await respond(handlers, request(fresh=fresh))
    assert (reply.status, reply.body, reply.records) == (200, DIRECT, ("batch_1-0",))
    assert [context.attach for context in handlers.asked] == [not fresh]
    assert not application.asked


@pytest.mark.parametrize("answer", [Answer(404, b"{}"), NOTED])
async def test_what_is_no_answer_is_the_applications_to_say(answer: Answer) -> None:
    """It attaches: the record may have been published."""
    reply, application = await respond(Handlers(answer), request(fresh=True))
    assert (reply.status, reply.body, reply.headers) == (200, WHOLE, {"x-request-id": "one"})
    assert [context.attach for context in application.asked] == [True]


async def test_a_path_only_the_application_knows() -> None:
    handlers = Handlers()
    reply, application = await respond(handlers, request("/v1/embeddings", fresh=True))
    assert (reply.body, len(application.asked), handlers.asked) == (WHOLE, 1, [])


async def test_the_log_is_looked_at_when_a_first_run_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """There was an earlier run after all, and its frames came before anybody read them here."""
    monkeypatch.setattr(backend, "FRESH_S", 0.01)
    handlers = Handlers(None)
    reply, application = await respond(handlers, request(fresh=True))
    assert (reply.body, handlers.left) == (WHOLE, 1)
    assert [context.attach for context in application.asked] == [True]


async def test_a_line_cannot_follow_a_response() -> None:
    """Refused before anything is asked for it, and told in the error file."""
    waiting = urgency(Clock(), 1)
    spec = msgspec.structs.replace(waiting._spec, endpoint="/v1/responses")
    nobody: Any = None
    runner = LineRunner(spec, InnerBackend(nobody, nobody, nobody, nobody), BatchSettings(), waiting)
    body = {"model": "m", "input": "And then?", "previous_response_id": "resp_1"}
    answer = await runner.run(RawLine(0, json.dumps({"custom_id": "c", "body": body}).encode()))
    response = json.loads(answer.row)["response"]
    assert (answer.kind, response["status_code"]) == ("error", 400)
    assert "put the conversation so far into its input" in response["body"]["error"]["message"]
