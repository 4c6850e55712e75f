"""How many engines, of which kind, and how work is divided between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from penstock.queue.settings import Section

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}
"""Engines without a GPU: 1 GiB of KV cache and one thread each, and no compiler, which would stall the whole engine for
twenty seconds at the first request for log probabilities."""


class WorkerSettings(Section):
    """The Ray Serve application of one pool."""

    section = "workers"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_WORKERS_", extra="forbid", frozen=True)

    prefill: int = Field(default=1, ge=0, description="Prefill replicas.")
    decode: int = Field(default=1, ge=0, description="Decode replicas.")
    mixed: int = Field(default=0, ge=0, description="Replicas that do both; used instead of prefill and decode.")
    dispatchers: int = Field(default=1, ge=1)
    engine: Literal["vllm", "simulated"] = "vllm"
    short_prompt_tokens: int = Field(
        default=32, ge=0, description="Uncached prompts up to this length skip the prefill pool."
    )
    max_attempts: int = Field(
        default=3, ge=1, description="Replicas that may die or fail with one request before it is dead-lettered."
    )
    reserved_share: float = Field(
        default=0.1, ge=0, lt=1, description="Share of each replica that batch work leaves to the other classes."
    )
    drain_grace_s: float = Field(
        default=25, ge=0, description="Time a replica that is told to end gets to finish what it runs."
    )
    update_surge_percent: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Percent of a role, rounded up, that an update starts before it ends old ones.",
    )
    nixl_progress_delay_us: int = Field(
        default=1000, ge=0, description="Pause of NIXL's progress thread; 0 spins a core: only with cores to spare."
    )
    gpus_per_replica: float = Field(default=0, ge=0)
    cpus_per_replica: float = Field(default=1, ge=0)
    step_profile: str = Field(
        default="instant", description="Step times of the simulated engine: instant, or such as h100/llama3.1-8b."
    )

    @model_validator(mode="after")
    def _one_shape(self) -> WorkerSettings:
        if self.mixed and (self.prefill or self.decode):
            raise ValueError("set either mixed, or prefill and decode: mixed replicas do both; set the others to 0")
        if not self.mixed and not (self.prefill and self.decode):
            raise ValueError("a pool needs at least one prefill and one decode replica, or mixed replicas")
        return self
