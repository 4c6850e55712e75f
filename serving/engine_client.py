"""vLLM's engine client, with the queue as the engine.

One of the two modules that touch vLLM. vLLM's ``AsyncLLM`` renders, tokenizes, validates, detokenizes and formats;
this client takes its finished engine requests, publishes them, and feeds token frames back. Everything OpenAI-shaped
stays vLLM's own code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
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
from penstock.queue.messages import TERMINAL, Delivered, Finish, Frame, Logprobs, StreamError, Usage, encode
from penstock.queue.protocol import RequestQueue
from penstock.queue.readers import Readers, Revival, Standing
from penstock.queue.records import Record, pack_tokens, prefix_hashes
from penstock.queue.settings import ModelSettings
from penstock.serving.admission import Backlog
from penstock.serving.context import Outcome, RequestContext, current
from penstock.serving.durable.leaving import Leaving
from penstock.serving.errors import to_vllm_error
from penstock.serving.output_queue import OutputQueue

INGRESS_ONLY = frozenset(
    {
        "n", "stop", "include_stop_str_in_output", "output_text_buffer_length", "detokenize", "skip_special_tokens",
        "spaces_between_special_tokens", "output_kind", "stream_interval", "skip_clone", "flat_logprobs",
    }
)  # fmt: skip
"""Sampling parameters that are used up at the ingress: fan-out, detokenization and stop strings happen there."""

REVIVE_RETRY_S = 1.0
"""Redis or the broker are away: the client waits, and so do we."""
REVIVALS = 3
"""How often a reader that came later takes back an ABORT: the one it found, and such as were under way when it came.
While somebody reads nothing is parked, so any other is meant."""
COMPLETIONS = "/v1/completions"
"""The one path that takes several prompts."""
CANCELLED = Frame(TERMINAL, [], finish=Finish.ABORT)
"""Delivered in place of an ABORT that is final."""
TRANSFER_ARGS = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""What a client must not say: they name KV blocks of an engine, which may be another tenant's."""

log = structlog.get_logger()


class _Stream:
    """One engine request of one rendering: vLLM's id for it is unique to the rendering, the record's is not."""

    __slots__ = ("context", "output", "record", "revivals", "started")

    def __init__(self, record: Record, context: RequestContext, output: OutputQueue) -> None:
        self.record = record
        self.context = context
        self.output = output
        self.revivals = REVIVALS if context.attach else 0
        self.started = time.monotonic()


class QueueClient(EngineCoreClient):  # type: ignore[misc]
    """An ``EngineCoreClient`` whose core is every engine of a pool, reached through the queue.

    A request that may have been published before is *attached to*: its log is read from the start, and it is published
    only where nothing is known of it. Publishing a record twice is harmless: it runs once.
    """

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self, queue: RequestQueue, reader: TokenReader, readers: Readers, model: ModelSettings) -> None:
        self._queue = queue
        self._reader = reader
        self._readers = readers
        self._model = model
        self._batches: AsyncIterator[list[Delivered]] = reader.batches()
        self._streams: dict[str, _Stream] = {}
        self._leaving = Leaving(readers, reader.reads)
        self._tasks: set[asyncio.Task[None]] = set()
        self._published: list[str] = []
        self.output_of: Callable[[str], OutputQueue]
        """Where the output processor puts the outputs of a request; set by :class:`QueueLLM`."""
        self.failed: list[tuple[str, StreamError, Outcome]] = []
        self.draining = False
        """Set when this ingress is to end: clients that go away now go on elsewhere."""

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Publish or attach. Returns when the broker has acknowledged; raises (and cancels) when it has not."""
        context, local = current(), request.request_id
        record = _record(request, context, self._model, self._reader.channel)
        self._streams[local] = _Stream(record, context, self.output_of(local))
        self._reader.open(record.id, local, live=not context.attach)
        try:
            if context.saved is not None:
                await context.saved
            if not context.attach or await self._unknown(record):
                await self._queue.publish(record)
                self._note_published(record, context)
            context.outcome.accepted.set()
            if context.attach:
                self._reader.catch_up(local)
        except BaseException as error:
            self._close(local)
            stop = not context.attach or context.grace_s is not None
            self._leaving.add(record.id, 0, stop=stop)  # it may have been stored although nobody said so
            if isinstance(error, TransientError | InvalidRecord):
                context.outcome.fail(error)
                raise to_vllm_error(error) from error
            raise

    async def _unknown(self, record: Record) -> bool:
        (standing,) = await self._readers.attach([record.id])
        return standing is Standing.UNKNOWN

    def _note_published(self, record: Record, context: RequestContext) -> None:
        """Others may ask for it again while it waits in the queue: they need not publish it again."""
        if context.attach or context.grace_s is None:
            self._published.append(record.id)
            if len(self._published) == 1:
                self._start(self._note_all())

    async def _note_all(self) -> None:
        await asyncio.sleep(0)  # what is published in this turn of the loop comes along
        ids, self._published = self._published, []
        with suppress(StoreUnavailable):  # then they may be published twice, and still run once
            await self._readers.note_published(ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next step's worth of tokens of all streams of this ingress, stamped with this process' clock."""
        while True:
            outputs = [out for item in await anext(self._batches) if (out := self._output(item)) is not None]
            if outputs or self.failed:
                return EngineCoreOutputs(outputs=outputs)

    def _output(self, item: Delivered) -> EngineCoreOutput | None:
        frame, stream = item.frame, self._streams.get(item.id)
        if stream is None:
            return None
        if frame.finish is Finish.ABORT and stream.revivals > 0 and frame is not CANCELLED:
            stream.revivals -= 1
            self._start(self._revive(item.id, stream, frame, self._reader.frames(item.id) - 1))
            return _to_vllm(item.id, _without_end(frame), None) if frame.tokens else None
        if frame.finish is not None:
            self._close(item.id)
        if frame.error is not None:
            self.failed.append((item.id, frame.error, stream.context.outcome))
            return None
        if stream.output.full:
            self._reader.pause(item.id)
            stream.output.call_when_low(partial(self._reader.resume, item.id))
        return _to_vllm(item.id, frame, None if frame.usage is None else stream.started)

    async def _revive(self, local: str, stream: _Stream, frame: Frame, position: int) -> None:
        """It was parked because nobody read it, and here is a reader: let it go on. A cancellation that was asked for
        stays."""
        instead = encode(_without_end(frame)) if frame.tokens else b""
        while local in self._streams:
            try:
                revival = await self._readers.revive(stream.record.id, position, instead)
                if revival is Revival.REVIVED:
                    await self._queue.publish(stream.record)
                break
            except TransientError as error:
                log.warning("revival_delayed", request_id=stream.record.id, error=str(error))
                await asyncio.sleep(REVIVE_RETRY_S)
        else:
            return
        if revival is Revival.FINAL:
            await self._reader.deliver(local, CANCELLED)
        else:
            self._reader.rewind(local)

    def leave(self, request_ids: list[str]) -> None:
        """The client of these is gone. Their generation goes on for a while: it may come back, here or elsewhere."""
        for local in request_ids:
            stream = self._streams.get(local)
            self._close(local)
            if stream is not None:
                grace = stream.context.grace_s
                stays = grace is None or self.draining
                self._leaving.add(stream.record.id, 0 if stays else grace or 0, stop=not stays)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Called for what stop strings ended: nobody reads beyond."""
        for local in request_ids:
            stream = self._streams.get(local)
            self._close(local)
            if stream is not None:
                self._leaving.add(stream.record.id, 0)

    def _close(self, local: str) -> None:
        self._reader.close(local)
        self._streams.pop(local, None)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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


def _record(request: EngineCoreRequest, context: RequestContext, model: ModelSettings, reply_to: str) -> Record:
    if request.sampling_params is None or request.prompt_token_ids is None or request.mm_features:
        raise to_vllm_error(InvalidRecord("only text prompts for generation are supported"))
    prompt = pack_tokens(request.prompt_token_ids)
    hints = {"reasoning_ended": request.reasoning_ended, "reasoning_parser_kwargs": request.reasoning_parser_kwargs}
    return Record(
        id=_record_id(request, context),
        model=model.served_name,
        pool=model.pool,
        release=model.release,
        tenant=context.tenant,
        priority_class=context.priority_class,
        num_tokens=len(request.prompt_token_ids),
        prompt=prompt,
        sampling=_sampling(request.sampling_params),
        reply_to=reply_to,
        accepted_ms=context.accepted_ms,
        deadline_ms=context.deadline_ms,
        external_id=context.external_id,
        tags=context.tags,
        trace=context.trace,
        prefix_hashes=prefix_hashes(prompt, f"{context.tenant}:{request.cache_salt or ''}"),
        cache_salt=request.cache_salt,
        hints={name: value for name, value in hints.items() if value is not None},
        body=context.body,
    )


def _record_id(request: EngineCoreRequest, context: RequestContext) -> str:
    """The same at each rendering: by prompt and choice. vLLM's id says which these are: ``[{choice}_]{external id}-…``,
    and the external id of a completion ends in ``-{prompt}``."""
    external: str = request.external_req_id
    before, prompt = request.request_id.partition(external)[0], external.rpartition("-")[2]
    part = int(before[:-1]) if before else 0
    if context.path == COMPLETIONS and context.choices > context.n and prompt.isdecimal():
        part += int(prompt) * context.n
    name = context.stream_id if context.choices == 1 else f"{context.stream_id}:{part}"
    again = context.draws.occurrence(part)
    return f"{name}+{again}" if again else name


def _without_end(frame: Frame) -> Frame:
    return msgspec.structs.replace(frame, finish=None, stop_reason=None)


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
