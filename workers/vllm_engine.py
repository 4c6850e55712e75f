"""vLLM behind the :class:`~penstock.workers.engine.Engine` interface: this process owns the core itself.

Owning the core, instead of talking to vLLM's own engine process,
saves two interpreters and a hop per step, and leaves nothing behind when the replica is killed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.request import Request

from penstock.queue.errors import InvalidRecord
from penstock.queue.messages import Finish, Logprobs, Stage, Usage
from penstock.queue.settings import ModelSettings
from penstock.workers.engine import KV_LEASE_S, EngineInfo, Job, Load, Output
from penstock.workers.ports import reserved_port
from penstock.workers.sampling import for_prefill, remaining

KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


class VllmEngine:
    """One vLLM engine core, driven by one thread.

    Args:
        model: what to load; ``engine_args`` are passed to vLLM by name.
        role: ``prefill`` and ``decode`` engines exchange KV caches over NIXL, a ``mixed`` one does not.
        progress_delay_us: pause of NIXL's progress thread between polls.
    """

    def __init__(self, model: ModelSettings, role: str, progress_delay_us: int) -> None:
        if role in KV_ROLES:
            self._handshakes = reserved_port()
            os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(self._handshakes.getsockname()[1])
            _tame_progress_thread(progress_delay_us)
        config = EngineArgs(**_engine_args(model, role)).create_engine_config()
        processors = os.sched_getaffinity(0)
        self._core = EngineCore(config, Executor.get_class(config), log_stats=True)
        _unpin(processors)
        self._batch_queue = self._core.batch_queue
        cache = config.cache_config
        self._num_blocks = cache.num_gpu_blocks or 0
        self.info = EngineInfo(
            max_seqs=config.scheduler_config.max_num_seqs,
            kv_tokens=self._num_blocks * cache.block_size,
            block_size=cache.block_size,
            max_model_len=config.model_config.max_model_len,
        )

    def prepare(self, job: Job) -> Request:
        """Convert a job; hashes the prompt's blocks, has a grammar compiled in the background."""
        prompt = job.record.token_ids() + job.emitted
        if len(prompt) >= self.info.max_model_len:
            raise InvalidRecord(
                f"the prompt has {len(prompt)} tokens, this engine takes at most {self.info.max_model_len - 1}"
            )
        request = EngineCoreRequest(
            request_id=job.id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=_sampling_params(job),
            pooling_params=None,
            arrival_time=job.record.accepted_ms / 1000,
            lora_request=None,
            cache_salt=_cache_salt(job),
            data_parallel_rank=None,
            priority=job.record.priority_class.rank,
            abort_immediately=job.stage is Stage.RELEASE,
            reasoning_ended=job.record.hints.get("reasoning_ended"),
            reasoning_parser_kwargs=job.record.hints.get("reasoning_parser_kwargs"),
        )
        prepared, _ = self._core.preprocess_add_request(request)
        return prepared

    def add(self, prepared: Request) -> None:
        """Queue a prepared request."""
        self._core.add_request(prepared)

    def abort(self, ids: Sequence[str]) -> None:
        """Drop requests and free their blocks."""
        self._core.abort_requests(list(ids))

    def has_work(self) -> bool:
        """Requests in the scheduler, KV transfers included, or steps under way."""
        return bool(self._core.scheduler.has_requests() or self._batch_queue)

    def step(self) -> tuple[list[Output], bool]:
        """One step of the core."""
        by_client, executed = self._core.step_fn()
        outputs = [_output(o) for step in (by_client or {}).values() for o in step.outputs]
        self._core.post_step(executed)
        return outputs, executed

    def load(self) -> Load:
        """Present load, from the scheduler's own counters."""
        running, waiting = self._core.scheduler.get_request_counts()
        used = self._core.scheduler.get_kv_cache_usage() * self.info.kv_tokens
        return Load(running, waiting, int(used))

    def shutdown(self) -> None:
        """Free the device."""
        self._core.shutdown()


def _engine_args(model: ModelSettings, role: str) -> dict[str, Any]:
    args: dict[str, Any] = {
        "model": model.path,
        "served_model_name": model.served_name,
        "dtype": _dtype(model.dtype),
        "max_model_len": model.max_model_len,
        "distributed_executor_backend": "uni",
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "enforce_eager": _on_cpu(),  # compiling for a CPU takes minutes and gains little
    }
    if role in KV_ROLES:
        args["kv_transfer_config"] = KVTransferConfig(
            kv_connector="NixlConnector",
            kv_role=KV_ROLES[role],
            kv_buffer_device="cpu" if _on_cpu() else "cuda",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"kv_lease_duration": KV_LEASE_S},
        )
    return args | model.engine_args


def _dtype(wanted: str) -> str:
    """``auto`` means float32 on a processor without bfloat16 instructions: emulating them is eight times slower."""
    if wanted != "auto" or not _on_cpu():
        return wanted
    return wanted if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _unpin(processors: set[int]) -> None:
    """Undo the pinning of vLLM's CPU worker.

    Even told not to bind, it leaves the constructing thread on one processor: every engine of a host on the same one,
    with all threads that are started later.
    """
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # threads come and go
            os.sched_setaffinity(int(task), processors)


def _tame_progress_thread(delay_us: int) -> None:
    """Make NIXL's progress thread pause between polls.

    Its Python API hard-codes no pause, so from the first transfer on an idle engine burns a core. The
    configuration object is replaced by one that keeps our delay, before vLLM makes its agent.
    """
    from vllm.distributed import nixl_utils

    bindings = import_module(nixl_utils.NixlWrapper.__module__).nixlBind

    original = bindings.nixlAgentConfig

    def set_attribute(config: Any, name: str, value: Any) -> None:
        original.__setattr__(config, name, delay_us if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = type("AgentConfig", (original,), {"__setattr__": set_attribute})


def _sampling_params(job: Job) -> SamplingParams:
    sampling = remaining(job.record.sampling, len(job.emitted))
    transfer = job.kv
    if job.stage is Stage.PREFILL:
        sampling = for_prefill(sampling)
        transfer = {"do_remote_decode": True, "do_remote_prefill": False}
    if transfer is not None:
        extra = {**(sampling.get("extra_args") or {}), "kv_transfer_params": transfer}
        sampling = sampling | {"extra_args": extra}
    try:
        return msgspec.convert(sampling, SamplingParams)
    except (msgspec.ValidationError, VLLMClientError) as error:
        raise InvalidRecord(f"sampling parameters: {error}") from error


def _cache_salt(job: Job) -> str | None:
    """Tenants never share cached prefixes, so that none can time another's prompts."""
    salt = job.record.cache_salt
    return f"{job.record.tenant}:{salt}" if salt else job.record.tenant


def _output(out: EngineCoreOutput) -> Output:
    return Output(
        id=out.request_id,
        tokens=out.new_token_ids,
        finish=None if out.finish_reason is None else Finish(int(out.finish_reason)),
        stop_reason=out.stop_reason,
        usage=None if out.prefill_stats is None else _usage(out),
        logprobs=None if out.new_logprobs is None else _logprobs(out.new_logprobs),
        prompt_logprobs=_prompt_logprobs(out.new_prompt_logprobs_tensors),
        kv=out.kv_transfer_params,
    )


def _usage(out: EngineCoreOutput) -> Usage:
    stats = out.prefill_stats
    return Usage(stats.num_prompt_tokens, stats.num_local_cached_tokens, stats.num_external_cached_tokens)


def _logprobs(lists: LogprobsLists) -> Logprobs:
    return _pack(lists.logprob_token_ids, lists.logprobs, lists.sampled_token_ranks)


def _prompt_logprobs(tensors: LogprobsTensors | None) -> Logprobs | None:
    if tensors is None:
        return None
    token_ids, logprobs, ranks, *_ = tensors
    return _pack(token_ids.numpy(), logprobs.float().numpy(), ranks.numpy())


def _pack(token_ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray) -> Logprobs:
    return Logprobs(
        width=int(token_ids.shape[-1]),
        token_ids=np.ascontiguousarray(token_ids, dtype=np.int32).tobytes(),
        logprobs=np.ascontiguousarray(logprobs, dtype=np.float32).tobytes(),
        ranks=np.ascontiguousarray(ranks, dtype=np.int32).tobytes(),
    )
