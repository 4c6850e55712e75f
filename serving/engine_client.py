"""vLLM's engine client, with the queue as the engine.

One of the two modules that touch vLLM. vLLM's ``AsyncLLM`` renders, tokenizes, validates, detokenizes and formats;
this client takes its finished engine requests, publishes them, and feeds token frames back. Everything OpenAI-shaped
stays vLLM's own code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import structlog
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from penstock.queue.errors import InvalidRecord, StoreUnavailable, TransientError
from penstock.queue.mailbox import TokenReader
from penstock.queue.messages import Delivered, Frame, Logprobs, StreamError, Usage
from penstock.queue.protocol import RequestQueue
from penstock.queue.records import Record, now_ms, pack_tokens, prefix_hashes
from penstock.queue.settings import ModelSettings
from penstock.queue.token_log import RequestLog
from penstock.serving.admission import Backlog
from penstock.serving.context import RequestContext, current
from penstock.serving.errors import to_vllm_error

INGRESS_ONLY = frozenset(
    {
        "n", "stop", "include_stop_str_in_output", "output_text_buffer_length", "detokenize", "skip_special_tokens",
        "spaces_between_special_tokens", "output_kind", "stream_interval", "skip_clone", "flat_logprobs",
    }
)  # fmt: skip
"""Sampling parameters that are used up at the ingress: fan-out, detokenization and stop strings happen there."""

CANCEL_TRIES = 30
CANCEL_RETRY_S = 1.0
"""A cancellation is tried for half a minute, longer than Redis takes to restart. One that is lost wastes an engine's
time until the request's deadline; nobody waits for it."""
TRANSFER_ARGS = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""What a client must not say: they name KV blocks of an engine, which may be another tenant's."""

log = structlog.get_logger()


class QueueClient(EngineCoreClient):  # type: ignore[misc]
    """An ``EngineCoreClient`` whose core is every engine of a pool, reached through the queue."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self, queue: RequestQueue, request_log: RequestLog, reader: TokenReader, model: ModelSettings) -> None:
        self._queue = queue
        self._log = request_log
        self._reader = reader
        self._model = model
        self._batches: AsyncIterator[list[Delivered]] = reader.batches()
        self._accepted: dict[str, tuple[float, RequestContext]] = {}
        self._cancelling: set[asyncio.Task[None]] = set()
        self.failed: list[tuple[str, StreamError]] = []

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Publish. Returns when the broker has acknowledged; raises (and cancels) when it has not."""
        context = current()
        record = _record(request, context, self._model, self._reader.channel)
        self._reader.open(record.id)
        self._accepted[record.id] = (time.monotonic(), context)
        try:
            await self._queue.publish(record)
        except BaseException as error:
            self._close(record.id)
            self._cancel([record.id])  # it may have been stored although nobody said so
            if isinstance(error, TransientError | InvalidRecord):
                context.outcome.fail(error)
                raise to_vllm_error(error) from error
            raise

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next step's worth of tokens of all streams of this ingress, stamped with this process' clock."""
        while True:
            outputs = [out for item in await anext(self._batches) if (out := self._output(item)) is not None]
            if outputs or self.failed:
                return EngineCoreOutputs(outputs=outputs)

    def _output(self, item: Delivered) -> EngineCoreOutput | None:
        frame, accepted = item.frame, self._accepted.get(item.id)
        if frame.finish is not None:
            self._close(item.id)
        if frame.error is not None:
            if accepted is not None:
                accepted[1].outcome.fail(frame.error)
            self.failed.append((item.id, frame.error))
            return None
        started = accepted[0] if accepted is not None and frame.usage is not None else None
        return _to_vllm(item.id, frame, started)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Cancel in the queue or in whichever engine runs it; also called for what stop strings ended."""
        for request_id in request_ids:
            self._close(request_id)
        if request_ids:
            self._cancel(request_ids)

    def _cancel(self, request_ids: list[str]) -> None:
        """Cancel in a task of its own: whoever calls this is mostly being cancelled itself, and would not get to wait
        for Redis."""
        task = asyncio.create_task(self._cancelled(request_ids))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancelled(self, request_ids: list[str]) -> None:
        for attempt in range(1, CANCEL_TRIES + 1):
            try:
                await self._log.cancel(request_ids)
            except StoreUnavailable as error:
                log.warning("cancel_failed", request_ids=request_ids, attempt=attempt, error=str(error))
                await asyncio.sleep(CANCEL_RETRY_S)
            else:
                return

    def _close(self, request_id: str) -> None:
        self._reader.close(request_id)
        self._accepted.pop(request_id, None)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """Text generation only."""
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is no multi-modal cache to reset: such requests are refused."""

    def dp_engines_running(self) -> bool:
        """Asked by vLLM's elastic scaling only, which is not used."""
        return True

    def shutdown(self, timeout: float | None = None) -> None:
        """The queue outlives its clients; the ingress closes its connections itself."""


class QueueLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's ``AsyncLLM`` on a :class:`QueueClient`."""

    def __init__(self, config: VllmConfig, client: QueueClient, backlog: Backlog) -> None:
        self._backlog = backlog
        with _engine_client(client):
            super().__init__(config, Executor.get_class(config), log_stats=True, log_requests=False)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse with 503 and ``Retry-After`` when the queue is as long as it may get."""
        try:
            self._backlog.check(n)
        except TransientError as error:
            current().outcome.fail(error)
            raise to_vllm_error(error) from error

    def _run_output_handler(self) -> None:
        """vLLM's handler, with typed errors taken to the one stream they end."""
        client = cast(QueueClient, self.engine_core)
        if self.output_handler is None:
            inner = client.get_output_async

            async def with_errors() -> EngineCoreOutputs:
                outputs = await inner()
                self._end_failed(client)
                return outputs

            client.get_output_async = with_errors  # type: ignore[method-assign]
        super()._run_output_handler()

    def _end_failed(self, client: QueueClient) -> None:
        failed, client.failed = client.failed, []
        for request_id, error in failed:
            state = self.output_processor.request_states.get(request_id)
            if state is not None:
                whole = state.parent_req.request_id if state.parent_req is not None else request_id
                self.output_processor.abort_requests([whole], internal=True)
                state.queue.put(to_vllm_error(error))


@contextmanager
def _engine_client(client: QueueClient) -> Iterator[None]:
    """``AsyncLLM`` makes its core client through one factory; for the length of its constructor that is ours."""
    original = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: client)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = staticmethod(original)


def _record(request: EngineCoreRequest, context: RequestContext, model: ModelSettings, reply_to: str) -> Record:
    if request.sampling_params is None or request.prompt_token_ids is None or request.mm_features:
        raise to_vllm_error(InvalidRecord("only text prompts for generation are supported"))
    prompt = pack_tokens(request.prompt_token_ids)
    hints = {"reasoning_ended": request.reasoning_ended, "reasoning_parser_kwargs": request.reasoning_parser_kwargs}
    return Record(
        id=request.request_id,
        model=model.served_name,
        pool=model.pool,
        release=model.release,
        tenant=context.tenant,
        priority_class=context.priority_class,
        num_tokens=len(request.prompt_token_ids),
        prompt=prompt,
        sampling=_sampling(request.sampling_params),
        reply_to=reply_to,
        accepted_ms=now_ms(),
        deadline_ms=context.deadline_ms,
        external_id=context.external_id,
        tags=context.tags,
        trace=context.trace,
        prefix_hashes=prefix_hashes(prompt, f"{context.tenant}:{request.cache_salt or ''}"),
        cache_salt=request.cache_salt,
        hints={name: value for name, value in hints.items() if value is not None},
        body=context.body,
    )


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Parameters by name, without defaults and without what is used up here."""
    by_name = cast("dict[str, Any]", msgspec.to_builtins(params))
    extra = by_name.get("extra_args") or {}
    by_name["extra_args"] = {name: value for name, value in extra.items() if name not in TRANSFER_ARGS}
    return {name: value for name, value in by_name.items() if name not in INGRESS_ONLY and value not in (None, [], {})}


def _to_vllm(request_id: str, frame: Frame, accepted: float | None) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=frame.tokens,
        new_logprobs=None if frame.logprobs is None else LogprobsLists(*_arrays(frame.logprobs)),
        new_prompt_logprobs_tensors=_tensors(frame.prompt_logprobs),
        finish_reason=None if frame.finish is None else FinishReason(frame.finish),
        stop_reason=frame.stop_reason,
        events=None if accepted is None else _events(accepted),
        prefill_stats=None if frame.usage is None else _prefill_stats(frame.usage),
    )


def _events(accepted: float) -> list[EngineCoreEvent]:
    """Scheduling events on this process' clock. An engine's own would be another host's monotonic time; seen from here
    everything between acceptance and the first token is prefill."""
    kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
    return [EngineCoreEvent.new_event(kind, accepted) for kind in kinds]


def _prefill_stats(usage: Usage) -> PrefillStats:
    stats = PrefillStats()
    stats.set(usage.prompt_tokens, usage.cached_tokens, usage.transferred_tokens)
    return stats


def _arrays(logprobs: Logprobs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (-1, logprobs.width)
    return (
        np.frombuffer(logprobs.token_ids, dtype=np.int32).reshape(shape),
        np.frombuffer(logprobs.logprobs, dtype=np.float32).reshape(shape),
        np.frombuffer(logprobs.ranks, dtype=np.int32),
    )


def _tensors(logprobs: Logprobs | None) -> LogprobsTensors | None:
    if logprobs is None:
        return None
    return LogprobsTensors(*(torch.from_numpy(array.copy()) for array in _arrays(logprobs)))
