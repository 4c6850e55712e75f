"""The small interface both engines implement: vLLM's core, and the simulated engine.

An engine is driven by one thread (:mod:`penstock.workers.loop`): requests in, one step at a time, tokens out. It knows
nothing of Redis, Ray or attempts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from penstock.queue.messages import Finish, Logprobs, Stage, StreamError, Usage
from penstock.queue.records import Record

KV_LEASE_S = 30
"""A prefill engine keeps KV that nobody reads this long; a decode engine that waits to read it renews the lease by
heartbeats. vLLM's default for NIXL, set explicitly."""
KV_TRUST_S = 20.0
"""A hand-over is used within this time, else the KV is computed again: what is left of the lease covers the first
heartbeat, five seconds later, and clocks that differ."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What a dispatcher must know of an engine to keep it full and never overfull."""

    max_seqs: int
    kv_tokens: int
    block_size: int
    max_model_len: int


class Job(NamedTuple):
    """One request as an engine sees it: continue ``record``'s prompt + ``emitted``.

    ``kv`` are the transfer parameters a prefill engine returned, for a DECODE.
    """

    id: str
    stage: Stage
    record: Record
    emitted: list[int]
    kv: dict[str, Any] | None


class Output(NamedTuple):
    """What one step produced for one request. ``kv``: transfer parameters of a finished PREFILL.

    ``error``: the request could not be run; nothing else is set then but ``id``.
    """

    id: str
    tokens: list[int]
    finish: Finish | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    kv: dict[str, Any] | None = None
    error: StreamError | None = None


class Load(NamedTuple):
    """Requests running and waiting, KV cache tokens in use."""

    running: int
    waiting: int
    kv_used: int


class Engine(Protocol):
    """What drives GPUs. All methods but :meth:`prepare` are called by the one engine thread."""

    @property
    def info(self) -> EngineInfo:
        """Capacity, constant over the engine's life."""

    def prepare(self, job: Job) -> Any:
        """Convert a job into the engine's own request; called on the inbox thread, in parallel with steps.

        Raises:
            RequestError: the engine cannot run it; the message says why.
        """

    def add(self, prepared: Any) -> None:
        """Queue a prepared request."""

    def abort(self, ids: Sequence[str]) -> None:
        """Drop requests and free their KV blocks; unknown ids are ignored."""

    def has_work(self) -> bool:
        """Whether :meth:`step` should be called (also true while a KV transfer is under way)."""

    def step(self) -> tuple[list[Output], bool]:
        """Run one step. Returns outputs, and whether the model ran (False: waiting for a transfer)."""

    def load(self) -> Load:
        """Present load."""

    def shutdown(self) -> None:
        """Free the device and stop the engine's own threads."""
