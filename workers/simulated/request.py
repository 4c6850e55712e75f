"""A request inside the simulated engine, from :class:`~penstock.workers.engine.Job` to its last token."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec
import structlog

from penstock.queue.errors import InvalidRecord
from penstock.queue.messages import Finish, Stage, Usage
from penstock.workers.engine import EngineInfo, Job
from penstock.workers.simulated.kv_cache import chained_hash, root_hash
from penstock.workers.simulated.tokens import seed_of

log = structlog.get_logger()


class State(Enum):
    """Where a request is; it moves down, but a preempted one goes from RUNNING back to WAITING."""

    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    HELD = auto()  # a finished prefill whose blocks wait to be read
    DONE = auto()


class Handle(msgspec.Struct, frozen=True):
    """Transfer parameters: whose KV it is, where to say that it was read, and until when it is kept.

    ``lease`` is unique in its engine. ``expires`` is in seconds since the epoch.
    """

    engine: str
    request: str
    lease: int
    blocks: int
    tokens: int
    address: str
    expires: float


@dataclass(slots=True, eq=False)
class SimRequest:
    """``tokens`` are prompt and answer; the KV of the first ``computed`` of them is in ``blocks``.

    ``key`` orders requests: class, then arrival. ``hashes`` cover whole blocks, of which ``remembered`` are
    in the prefix cache. ``blocks`` have room for ``room`` tokens; with ``limit`` tokens the request ends.
    """

    id: str
    stage: Stage
    rank: int
    seed: int
    prompt_tokens: int
    tokens: array[int]
    limit: int
    stops: frozenset[int]
    min_length: int
    root: bytes
    hashes: list[bytes]
    remote: Handle | None
    key: tuple[int, int] = (0, 0)
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    room: int = 0
    computed: int = 0
    remembered: int = 0
    ready_at: float = 0.0
    admitted: bool = False
    usage: Usage | None = None

    @property
    def lease(self) -> int:
        """Its arrival number, unique in its engine."""
        return self.key[1]

    def finish(self) -> Finish | None:
        """Whether the last token ends the work here; a prefill's first token always does."""
        if self.stops and self.tokens[-1] in self.stops and len(self.tokens) >= self.min_length:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.limit else None

    def extend_hashes(self, blocks: int, block_size: int) -> None:
        """Hash whole blocks of tokens until there are ``blocks`` hashes."""
        hashes = self.hashes
        for index in range(len(hashes), blocks):
            parent = hashes[-1] if hashes else self.root
            hashes.append(chained_hash(parent, self.tokens[index * block_size : (index + 1) * block_size]))


def prepare_request(job: Job, info: EngineInfo) -> SimRequest:
    """Check a job and do the work that grows with its prompt.

    Raises:
        InvalidRecord: the job cannot run on this engine.
    """
    record = job.record
    tokens = array("I", record.token_ids())
    _check(job, len(tokens), info)
    prompt_tokens = len(tokens)
    tokens.extend(job.emitted)
    new_tokens = 1 if job.stage is Stage.PREFILL else record.max_tokens - len(job.emitted)
    request = SimRequest(
        id=job.id,
        stage=job.stage,
        rank=record.priority_class.rank,
        seed=seed_of(record.prompt),
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        limit=len(tokens) + new_tokens,
        stops=frozenset(record.sampling.get("stop_token_ids") or ()),
        min_length=prompt_tokens + (record.sampling.get("min_tokens") or 0),
        root=root_hash(record.tenant, record.cache_salt),
        hashes=[],
        remote=handle_of(job),
    )
    request.extend_hashes(len(tokens) // info.block_size, info.block_size)
    return request


def _check(job: Job, prompt_tokens: int, info: EngineInfo) -> None:
    max_tokens = job.record.max_tokens
    if not prompt_tokens:
        raise InvalidRecord("the prompt is empty")
    if prompt_tokens + max_tokens > info.max_model_len:
        raise InvalidRecord(
            f"prompt ({prompt_tokens}) and max_tokens ({max_tokens}) exceed the context, {info.max_model_len}"
        )
    if len(job.emitted) >= max_tokens:
        raise InvalidRecord(f"nothing left to generate: {len(job.emitted)} of {max_tokens} tokens emitted")


def handle_of(job: Job) -> Handle | None:
    """The job's transfer parameters; without any, or with those of another kind of engine, its input is computed, as
    in vLLM."""
    if job.kv is None:
        return None
    try:
        return msgspec.convert(job.kv, Handle)
    except msgspec.ValidationError as error:
        log.warning("kv_mismatched", request_id=job.record.id, error=str(error))
        return None
