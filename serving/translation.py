"""Engine requests of vLLM to records of the queue, and frames of the token log to engine outputs of vLLM."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from penstock.queue.errors import InvalidRecord
from penstock.queue.messages import Frame, Logprobs, Usage
from penstock.queue.records import Record, pack_tokens, prefix_hashes
from penstock.queue.settings import ModelSettings
from penstock.serving.context import RequestContext
from penstock.serving.errors import to_vllm_error
from penstock.serving.request import COMPLETIONS

INGRESS_ONLY = frozenset(
    {
        "n", "stop", "include_stop_str_in_output", "output_text_buffer_length", "detokenize", "skip_special_tokens",
        "spaces_between_special_tokens", "output_kind", "stream_interval", "skip_clone", "flat_logprobs",
    }
)  # fmt: skip
"""Sampling parameters that are used up at the ingress: fan-out, detokenization and stop strings happen there."""
TRANSFER_ARGS = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""What a client must not say: they name KV blocks of an engine, which may be another tenant's."""


def to_record(request: EngineCoreRequest, context: RequestContext, model: ModelSettings, reply_to: str) -> Record:
    """The record of an engine request, to be answered on the channel ``reply_to``.

    Raises vLLM's error for a prompt that is more than text.
    """
    if request.sampling_params is None or request.prompt_token_ids is None or request.mm_features:
        raise to_vllm_error(InvalidRecord("only text prompts for generation are supported"))
    asked = context.request
    prompt = pack_tokens(request.prompt_token_ids)
    hints = {"reasoning_ended": request.reasoning_ended, "reasoning_parser_kwargs": request.reasoning_parser_kwargs}
    return Record(
        id=_record_id(request, context),
        model=model.served_name,
        pool=model.pool,
        release=model.release,
        tenant=asked.tenant,
        priority_class=asked.priority_class,
        num_tokens=len(request.prompt_token_ids),
        prompt=prompt,
        sampling=_sampling(request.sampling_params),
        reply_to=reply_to,
        accepted_ms=asked.accepted_ms,
        deadline_ms=asked.deadline_ms,
        external_id=asked.external_id,
        tags=asked.tags,
        trace=asked.trace,
        prefix_hashes=prefix_hashes(prompt, f"{asked.tenant}:{request.cache_salt or ''}"),
        cache_salt=request.cache_salt,
        hints={name: value for name, value in hints.items() if value is not None},
        body=asked.body,
    )


def _record_id(request: EngineCoreRequest, context: RequestContext) -> str:
    """The same at each rendering: by prompt and choice. vLLM's id says which these are: ``[{choice}_]{external id}-…``,
    and the external id of a completion ends in ``-{prompt}``."""
    asked = context.request
    external: str = request.external_req_id
    before, prompt = request.request_id.partition(external)[0], external.rpartition("-")[2]
    part = int(before[:-1]) if before else 0
    if asked.path == COMPLETIONS and asked.choices > asked.n and prompt.isdecimal():
        part += int(prompt) * asked.n
    name = asked.stream_id if asked.choices == 1 else f"{asked.stream_id}:{part}"
    again = context.draws.occurrence(part)
    return f"{name}+{again}" if again else name


def without_end(frame: Frame) -> Frame:
    """Its tokens alone."""
    return msgspec.structs.replace(frame, finish=None, stop_reason=None)


def without_cached(frame: Frame) -> Frame:
    """Nothing of its prompt came from a cache, as far as it says. vLLM reports what the first of several choices to
    arrive had cached, and an answer must be the same each time it is rendered."""
    usage = None if frame.usage is None else Usage(frame.usage.prompt_tokens)
    return msgspec.structs.replace(frame, usage=usage)


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Parameters by name, without defaults and without what is used up here."""
    by_name = cast("dict[str, Any]", msgspec.to_builtins(params))
    extra = by_name.get("extra_args") or {}
    by_name["extra_args"] = {name: value for name, value in extra.items() if name not in TRANSFER_ARGS}
    return {name: value for name, value in by_name.items() if name not in INGRESS_ONLY and value not in (None, [], {})}


def to_vllm_output(request_id: str, frame: Frame, accepted: float | None) -> EngineCoreOutput:
    """A frame as the output of an engine step. ``accepted``: when the request was (monotonic seconds), with its first
    frame only."""
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
