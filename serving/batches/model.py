"""A batch: what was asked for, what became of it, and OpenAI's object for both."""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Any

import msgspec

from penstock.serving.batches.lines import Problem


class Status(StrEnum):
    """OpenAI's statuses."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)
"""Statuses of a batch on which there is something to do."""


class BatchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for; never changes. ``output_expires_after_s`` counts from when the files are made."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_ms: int
    expires_ms: int
    metadata: dict[str, str] | None
    output_expires_after_s: int

    @property
    def ordered(self) -> bool:
        """Whether results are wanted in the order of the input."""
        return (self.metadata or {}).get("ordered") == "true"

    def output_id(self, kind: str) -> str:
        """The id of an output file: always the same, so that making it twice makes it once."""
        return f"file-{uuid.uuid5(uuid.UUID(self.id.removeprefix('batch_')), kind).hex}"


class Counters(msgspec.Struct, kw_only=True):
    """Lines and tokens so far."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """A batch as stored. Times by status, in seconds since the epoch, are in ``times``."""

    spec: BatchSpec
    status: Status
    total: int = 0
    model: str | None = None
    counters: Counters = msgspec.field(default_factory=Counters)
    problems: list[Problem] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: dict[Status, int] = {}

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        spec, counters = self.spec, self.counters
        return {
            "id": spec.id,
            "object": "batch",
            "endpoint": spec.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": self.problems} if self.problems else None,
            "input_file_id": spec.input_file_id,
            "completion_window": spec.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": spec.created_ms // 1000,
            "expires_at": spec.expires_ms // 1000,
            **{f"{s}_at": self.times.get(s) for s in Status if s is not Status.VALIDATING},
            "request_counts": {"total": self.total, "completed": counters.completed, "failed": counters.failed},
            "usage": _usage(counters),
            "metadata": spec.metadata,
        }


def new_batch_id() -> str:
    """A fresh id."""
    return f"batch_{uuid.uuid4().hex}"


def _usage(counters: Counters) -> dict[str, Any]:
    return {
        "input_tokens": counters.input_tokens,
        "input_tokens_details": {"cached_tokens": counters.cached_tokens},
        "output_tokens": counters.output_tokens,
        "output_tokens_details": {"reasoning_tokens": counters.reasoning_tokens},
        "total_tokens": counters.input_tokens + counters.output_tokens,
    }
