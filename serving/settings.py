"""The ingress: where it listens and what it lets in."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from penstock.queue.records import PriorityClass
from penstock.queue.settings import Section


class IngressSettings(Section):
    """One ingress process."""

    section = "ingress"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_INGRESS_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    max_backlog_requests: int = Field(
        default=100_000, ge=1, description="Unfinished requests in the queue above which new ones get 503."
    )
    keepalive_s: float = Field(
        default=15.0, gt=0, description="Silence on a stream before a keep-alive; balancers cut silent streams at 50 s."
    )
    resume_grace_s: float = Field(
        default=1.0, ge=0, description="How long a stream generates on without its client before it is parked."
    )
    keyed_grace_s: float = Field(
        default=30.0, ge=0, description="The same for requests with an Idempotency-Key: their clients come back."
    )
    deadline_s: dict[PriorityClass, int] = Field(
        default={PriorityClass.INTERACTIVE: 600, PriorityClass.STANDARD: 3600, PriorityClass.BATCH: 86_400},
        description="Seconds until a request of a class ends with deadline_exceeded.",
    )
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    vllm_args: list[str] = Field(default_factory=list, description="Further arguments of vLLM's API server.")
