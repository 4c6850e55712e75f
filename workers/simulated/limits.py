"""The sizes of a simulated engine, given as the vLLM engine arguments of the same names."""

from __future__ import annotations

import msgspec

from penstock.queue.settings import ModelSettings
from penstock.workers.engine import EngineInfo


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults are vLLM's on a server GPU; the KV cache is what an H100 has left beside an 8B model."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8_192
    block_size: int = 16
    num_gpu_blocks_override: int = 28_672
    max_model_len: int = 32_768
    kv_load_fails_every: int = 0
    """A fault to test with, in no real engine: every so manieth KV transfer fails; 0 is never."""
    poison_token: int = -1
    """Chaos tests: the process dies of computing a prompt with this token."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if self.num_gpu_blocks_override * self.block_size < self.max_model_len:
            raise ValueError("num_gpu_blocks_override blocks must hold one sequence of max_model_len tokens")

    @property
    def info(self) -> EngineInfo:
        """What a dispatcher sees of it."""
        return EngineInfo(
            max_seqs=self.max_num_seqs,
            kv_tokens=self.num_gpu_blocks_override * self.block_size,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
        )


def limits_of(model: ModelSettings) -> Limits:
    """The limits among a model's engine arguments; arguments that only a real engine knows are left aside.

    Raises:
        msgspec.ValidationError: a limit is no integer, or they contradict each other.
    """
    named = {} if model.max_model_len is None else {"max_model_len": model.max_model_len}
    return msgspec.convert(model.engine_args | named, Limits)
