"""vLLM's serving objects, asked without vLLM's application around them.

What surrounds them there (FastAPI's routing and validation, middleware, tasks that watch the connection, the response
as an ASGI stream) was a sixth of an ingress' CPU. So a request is given to the serving object that its route would have
called. What cannot be one is left to the application, which says in its own words what is wrong.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import msgspec

from penstock.serving.context import current
from penstock.serving.edge.asgi import Scope
from penstock.serving.request import CHAT, COMPLETIONS, RESPONSES, ClientRequest

_decode = msgspec.json.Decoder().decode


class Answer(NamedTuple):
    """A whole answer, or error, in JSON."""

    status: int
    body: bytes


NOTED = Answer(500, b"{}")
"""In place of an error that the engine client has noted in the request's outcome, which the edge renders."""
Events = AsyncGenerator[bytes, None]
"""The blocks of an event stream."""


class _Route(NamedTuple):
    """What vLLM's route of one path does: the type of requests, the method, how answers and events are dumped."""

    request: Any
    call: Any
    events: Callable[[AsyncGenerator[Any, None]], Events]
    by_alias: bool = False


class Handlers:
    """The serving objects of an initialised ``app``."""

    def __init__(self, app: Any) -> None:
        from starlette.requests import Request
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        self._request = Request
        self._error = ErrorResponse
        self._app = app
        self._routes = _routes(app.state)

    def know(self, path: str) -> bool:
        """Whether there is one for this path."""
        return path in self._routes

    async def answer(self, asked: ClientRequest, scope: Scope) -> Answer | Events | None:
        """The answer to the current context's request; None where the application must be asked. The events of a stream
        come as the tokens do.
        """
        route, outcome = self._routes[asked.path], current().outcome
        try:
            parsed = route.request.model_validate(_decode(asked.body))
            answer = await route.call(parsed, self._request(dict(scope) | {"app": self._app, "state": {}}))
        except Exception:  # of any kind: the application has words for each
            return None if outcome.error is None else NOTED
        if isinstance(answer, AsyncGenerator):
            return route.events(answer)
        status = int(answer.error.code) if isinstance(answer, self._error) else 200
        return Answer(status, answer.model_dump_json(by_alias=route.by_alias).encode())


async def _blocks(events: AsyncGenerator[str, None]) -> Events:
    async for event in events:
        yield event.encode()


async def _typed_blocks(events: AsyncGenerator[Any, None]) -> Events:
    async for event in events:
        data = event.model_dump_json(indent=None, by_alias=True)
        yield f"event: {getattr(event, 'type', 'unknown')}\ndata: {data}\n\n".encode()


def _routes(state: Any) -> dict[str, _Route]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    chat, completion = state.openai_serving_chat, state.openai_serving_completion
    responses = state.openai_serving_responses
    found: dict[str, _Route] = {}
    if chat is not None:
        found[CHAT] = _Route(ChatCompletionRequest, chat.create_chat_completion, _blocks)
    if completion is not None:
        found[COMPLETIONS] = _Route(CompletionRequest, completion.create_completion, _blocks)
    if responses is not None:
        found[RESPONSES] = _Route(ResponsesRequest, responses.create_responses, _typed_blocks, by_alias=True)
    return found
