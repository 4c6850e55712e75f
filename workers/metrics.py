"""Prometheus metrics of an engine replica, under the names dashboards for vLLM already know."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from penstock.workers.engine import EngineInfo, Load, Output

STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class EngineMetrics:
    """What one engine process exports; ``port`` is where."""

    def __init__(self, model: str, role: str, replica: str) -> None:
        self._registry = CollectorRegistry()
        labels = {"model_name": model, "role": role, "replica": replica}
        self._running = self._gauge("vllm:num_requests_running", "Requests in the running batch.", labels)
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting in the engine.", labels)
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "KV cache blocks in use; 1 is all.", labels)
        self._tokens = self._counter("vllm:generation_tokens", "Tokens generated.", labels)
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens of requests with a first token.", labels)
        self._cached = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", labels)
        self._transferred = self._counter("penstock_kv_transferred_tokens", "Prompt tokens loaded over NIXL.", labels)
        self._steps = Histogram(
            "penstock_engine_step_seconds",
            "Duration of an engine step.",
            list(labels),
            buckets=STEP_BUCKETS,
            registry=self._registry,
        ).labels(**labels)

    def serve(self, host: str) -> int:
        """Start the exporter's own HTTP server on a free port and return it."""
        server, _ = start_http_server(0, addr=host, registry=self._registry)
        return int(server.server_port)

    def step(self, duration_s: float, outputs: Sequence[Output]) -> None:
        """Account for one step."""
        self._steps.observe(duration_s)
        self._tokens.inc(sum(len(output.tokens) for output in outputs))
        for output in outputs:
            if output.usage is not None:
                self._prompt.inc(output.usage.prompt_tokens)
                self._cached.inc(output.usage.cached_tokens)
                self._transferred.inc(output.usage.transferred_tokens)

    def load(self, load: Load, info: EngineInfo) -> None:
        """Set the gauges; called with each heartbeat."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._kv_usage.set(load.kv_used / max(1, info.kv_tokens))

    def _gauge(self, name: str, text: str, labels: dict[str, str]) -> Gauge:
        return Gauge(name, text, list(labels), registry=self._registry).labels(**labels)

    def _counter(self, name: str, text: str, labels: dict[str, str]) -> Counter:
        return Counter(name, text, list(labels), registry=self._registry).labels(**labels)
