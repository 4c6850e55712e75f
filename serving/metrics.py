"""Prometheus metrics of an ingress: vLLM's front-end metrics stay, its engine gauges go."""

from __future__ import annotations

from prometheus_client import REGISTRY

ENGINE_GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:engine_sleep_state",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:external_prefix_cache_queries",
    "vllm:external_prefix_cache_hits",
    "vllm:mm_cache_queries",
    "vllm:mm_cache_hits",
    "vllm:num_preemptions",
    "vllm:cache_config_info",
)
"""Metrics that vLLM registers with its front end but fills from a scheduler. Here they would stay 0 for ever and be
taken for an idle fleet; the engine replicas export them."""


def drop_engine_gauges() -> None:
    """Take the scheduler's metrics out of this process' registry."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", None) in ENGINE_GAUGES:
            REGISTRY.unregister(collector)
