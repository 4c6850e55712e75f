"""vLLM's ``AsyncLLM`` with the queue for an engine: admission, departures and typed errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor

from penstock.queue.errors import TransientError
from penstock.serving.admission import Backlog
from penstock.serving.context import current
from penstock.serving.engine_client import QueueClient
from penstock.serving.errors import to_vllm_error
from penstock.serving.output_queue import OutputQueue


class QueueLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's ``AsyncLLM`` on a :class:`QueueClient`."""

    def __init__(self, config: VllmConfig, client: QueueClient, backlog: Backlog) -> None:
        self._backlog = backlog
        with _engine_client(client):
            super().__init__(config, Executor.get_class(config), log_stats=True, log_requests=False)
        states = self.output_processor.request_states
        client.output_of = lambda local: cast(OutputQueue, states[local].queue)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse with 503 and ``Retry-After`` when the queue is as long as it may get."""
        try:
            self._backlog.check(n)
        except TransientError as error:
            current().outcome.fail(error)
            raise to_vllm_error(error) from error

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Called where a client went away in the middle of its answer."""
        ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        cast(QueueClient, self.engine_core).leave(self.output_processor.abort_requests(ids, internal))

    def _run_output_handler(self) -> None:
        """vLLM's handler, with typed errors taken to the one stream they end."""
        client = cast(QueueClient, self.engine_core)
        if self.output_handler is None:
            inner = client.get_output_async

            async def with_errors() -> EngineCoreOutputs:
                self._end_failed(client)  # what came before the errors has been processed by now
                return await inner()

            client.get_output_async = with_errors  # type: ignore[method-assign]
        super()._run_output_handler()

    def _end_failed(self, client: QueueClient) -> None:
        failed, client.failed = client.failed, []
        for request_id, error, outcome in failed:
            state = self.output_processor.request_states.get(request_id)
            if state is not None:
                cast(OutputQueue, state.queue).fail(to_vllm_error(error), partial(outcome.fail, error))
                whole = state.parent_req.request_id if state.parent_req is not None else request_id
                client.leave(self.output_processor.abort_requests([whole], internal=True))


@contextmanager
def _engine_client(client: QueueClient) -> Iterator[None]:
    """``AsyncLLM`` makes its core client through one factory; for the length of its constructor that is ours."""
    original = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: client)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = staticmethod(original)
