"""The lines of batches, run by vLLM's own handlers in this process: no HTTP in between."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from penstock.queue.errors import RequestError
from penstock.queue.readers import Readers
from penstock.queue.records import PriorityClass, now_ms
from penstock.serving.batches.answers import Reply
from penstock.serving.batches.runner import LineRequest
from penstock.serving.context import NOTHING_SEEN, RequestContext, enter
from penstock.serving.durable.bodies import for_handler, previous_response
from penstock.serving.durable.inner import Inner, attached
from penstock.serving.edge.intake import count_prompts, read_n, read_peek
from penstock.serving.errors import InvalidField
from penstock.serving.handlers import Answer, Handlers
from penstock.serving.request import COMPLETIONS, RESPONSES, ClientRequest, scope_of

if TYPE_CHECKING:
    from penstock.serving.engine_client import QueueClient

FRESH_S = 60.0
"""A line that nobody has asked for before is published and read without looking for an earlier run of it. If there was
one after all, its frames may have come before anybody read them here: after this time the log is looked at."""

FOLLOWS = (
    "previous_response_id: a line of a batch cannot follow a response; put the conversation so far into its input."
)


class InnerBackend:
    """The :class:`~penstock.serving.batches.runner.Backend` of an ingress."""

    def __init__(self, handlers: Handlers, inner: Inner, readers: Readers, engine: QueueClient) -> None:
        self._handlers = handlers
        self._engine = engine
        self._inner = inner
        self._readers = readers

    async def respond(self, request: LineRequest) -> Reply:
        """Publish, or attach to the run there is already, and wait for the whole answer."""
        asked = stored(request)
        if request.fresh:
            fresh = RequestContext(asked, skip=NOTHING_SEEN, grace_s=None)
            with suppress(TimeoutError):
                async with asyncio.timeout(FRESH_S):
                    if (reply := await self._answered(fresh)) is not None:
                        return reply
        elif (reply := await self._answered(attached(asked))) is not None:
            return reply
        context = attached(asked)
        response = await self._inner.respond(context)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        return Reply(response.status, headers, response.body, _records(context))

    async def _answered(self, context: RequestContext) -> Reply | None:
        """The answer, without HTTP; None where there is none and the whole application is to say why. Sets the context
        of the running task."""
        asked = context.request
        if not self._handlers.know(asked.path):
            return None
        enter(context)
        answer = await self._handlers.answer(asked, scope_of(asked, {}))
        if not isinstance(answer, Answer) or answer.status != 200 or context.outcome.error is not None:
            return None
        return Reply(200, {"x-request-id": asked.external_id}, answer.body, _records(context))

    async def urge(self, requests: Sequence[LineRequest]) -> None:
        """Publish again what waits in the batch class: a record that is published twice runs once."""
        await self._engine.urge({request.stream_id for request in requests}, PriorityClass.STANDARD)

    async def stop(self, requests: Sequence[LineRequest]) -> list[LineRequest]:
        """Have engines stop what they do for these; nobody will ask for them again. Returns those that had ended."""
        owners = {record_id: request for request in requests for record_id in _record_ids(request)}
        progress = await self._readers.progress(list(owners))
        await self._readers.cancel(list(owners), final=True)
        live = {request.stream_id for request, each in zip(owners.values(), progress, strict=True) if not each.done}
        return [request for request in requests if request.stream_id not in live]


def _record_ids(request: LineRequest) -> list[str]:
    with suppress(RequestError):
        return stored(request).record_ids
    return []  # it cannot have been published


def _records(context: RequestContext) -> tuple[str, ...]:
    return tuple(context.request.record_ids) if context.outcome.accepted.is_set() else ()


def stored(request: LineRequest) -> ClientRequest:
    """The request as if a client had sent it. Raises :class:`RequestError` for a body it cannot have."""
    peek = read_peek(request.body)
    if request.path == RESPONSES and previous_response(request.body) is not None:
        raise InvalidField(FOLLOWS, "previous_response_id")
    n = read_n(peek.n)
    return ClientRequest(
        stream_id=request.stream_id,
        tenant=request.tenant,
        key_id=request.key_id,
        path=request.path,
        body=for_handler(request.path, request.body, request.stream_id),
        external_id=request.external_id,
        priority_class=request.priority_class,
        accepted_ms=now_ms(),
        deadline_ms=request.deadline_ms,
        model=peek.model,
        n=n,
        choices=n * count_prompts(peek.prompt) if request.path == COMPLETIONS else n,
        tags=request.tags,
    )
