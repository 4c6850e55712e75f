"""vLLM's serving objects, asked without HTTP.

What surrounds them in vLLM's application (FastAPI's routing and validation, middleware, watching the client's
connection, the response as an ASGI stream) costs as much per line as the answer itself. So a line's body is given to
the serving object its route would have called, and the object that comes back is the answer's body. Only answers are
taken from here: whatever else comes out is left to the application, which says in its own words what is wrong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from penstock.serving.batches.answers import Reply
from penstock.serving.context import RequestContext, enter
from penstock.serving.edge.asgi import Scope
from penstock.serving.request import ClientRequest, scope_of

_decode = msgspec.json.Decoder().decode


class _Route(NamedTuple):
    """What vLLM's route of one path does: types of request and answer, the method, how the answer is dumped."""

    request: Any
    answer: Any
    call: Any
    by_alias: bool = False


class Direct:
    """Asks the serving objects of an initialised ``app``."""

    def __init__(self, app: Any) -> None:
        from starlette.requests import Request

        self._request = Request
        self._app = app
        self._routes = _routes(app.state)

    async def respond(self, context: RequestContext) -> Reply | None:
        """The answer; None where the application must be asked. Sets the context of the running task."""
        asked = context.request
        route = self._routes.get(asked.path)
        if route is None:
            return None
        enter(context)
        try:
            parsed = route.request.model_validate(_decode(asked.body))
            answer = await route.call(parsed, self._request(self._scope(asked)))
        except Exception:  # an error of any kind is rendered by the application
            return None
        if type(answer) is not route.answer or context.outcome.error is not None:
            return None
        body = answer.model_dump_json(by_alias=route.by_alias).encode()
        return Reply(200, {"x-request-id": asked.external_id}, body)

    def _scope(self, asked: ClientRequest) -> Scope:
        return scope_of(asked, {"app": self._app, "state": {}})


def _routes(state: Any) -> dict[str, _Route]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse

    chat, completion, responses = (
        state.openai_serving_chat,
        state.openai_serving_completion,
        state.openai_serving_responses,
    )
    found: dict[str, _Route] = {}
    if chat is not None:
        call = chat.create_chat_completion
        found["/v1/chat/completions"] = _Route(ChatCompletionRequest, ChatCompletionResponse, call)
    if completion is not None:
        found["/v1/completions"] = _Route(CompletionRequest, CompletionResponse, completion.create_completion)
    if responses is not None:
        found["/v1/responses"] = _Route(ResponsesRequest, ResponsesResponse, responses.create_responses, by_alias=True)
    return found
