"""One request running in this replica: turns what the engine produced into entries of the token log."""

from __future__ import annotations

import msgspec

from penstock.queue.errors import StreamInterrupted
from penstock.queue.messages import (
    TERMINAL,
    EventKind,
    Finish,
    Frame,
    Logprobs,
    Run,
    Stage,
    StreamError,
    encode,
    lua_string,
)
from penstock.queue.records import Record, now_ms
from penstock.queue.token_log import Append
from penstock.workers.engine import KV_TRUST_S, Job, Output
from penstock.workers.sampling import continuable, remaining

_ENGINE_ERROR = StreamError("engine_failed", "the engine failed on this request; try again", 500, retryable=True)
_DIVERGED = StreamError(
    StreamInterrupted.code,
    "the engine died, and running the request again did not give the tokens already delivered; send it again",
    StreamInterrupted.status,
)


class Assignment:
    """One attempt of a request that was given to this replica. By itself it can only be given back."""

    def __init__(self, request_id: str, attempt: int, fence: int, next_: int = TERMINAL) -> None:
        """``next_``: the position at which it is to go on, where that is known."""
        self.request_id = request_id
        self.attempt = attempt
        self.job_id = f"{request_id}:{attempt}"
        self._fence = fence
        self._next = next_

    def append(self, output: Output) -> Append | None:
        """It could not even be read: whatever comes of it is a failure."""
        return self.give_back(EventKind.FAILED)

    def give_back(self, why: EventKind) -> Append:
        """Leave it to its dispatcher to find another replica."""
        return self._entry(self._next, 0, None, back=why.value)

    def _entry(
        self, index: int, count: int, frame: Frame | None, *, final: bool = False, back: str | None = None
    ) -> Append:
        data = lua_string(b"" if frame is None else encode(frame))
        return Append(self.request_id, self.attempt, index, count, data, final, fence=self._fence, back=back)


class Stream(Assignment):
    """Position and attempt of one running request. Built by the inbox thread, then used by the writer thread alone.

    A replay starts at the beginning: what it produces is compared with the tokens in the log, and only what lies beyond
    them is appended.
    """

    def __init__(self, run: Run, record: Record, attempt: int, block_size: int, fence: int = 0) -> None:
        super().__init__(run.id, attempt, fence, len(run.emitted))
        self.stage = run.stage
        self._run = run
        self._record = record
        self._at = 0 if run.replay else len(run.emitted)
        self._shares_first_token = first_token_from_prefill(record, len(run.emitted), block_size)

    def job(self) -> Job:
        """The request as the engine sees it. Its id holds the attempt, so that two attempts can meet in one engine."""
        return Job(self.job_id, self.stage, self._record, self._run.emitted[: self._at], self._run.kv)

    @property
    def transfers(self) -> bool:
        """Whether the KV cache is read from another engine."""
        return self.stage is Stage.DECODE and self._run.kv is not None

    @property
    def kv_expired(self) -> bool:
        """Whether the prefill engine may have freed the blocks that :meth:`job` names: reading them gives garbage."""
        return self.transfers and now_ms() >= self._run.kv_until_ms

    def recompute(self) -> Job:
        """The request without the other engine's KV cache, under another name: the first job may be loading still."""
        self._run = msgspec.structs.replace(self._run, kv=None)
        self.job_id += "r"
        return self.job()

    def append(self, output: Output) -> Append | None:
        """The log entry for one step's output; none while a replay is behind the log."""
        if output.error is not None or output.finish is Finish.ERROR:
            error = output.error or _ENGINE_ERROR
            return self.give_back(EventKind.FAILED) if error.retryable else self._fail(error)
        if self.stage is Stage.PREFILL and output.finish in (Finish.STOP, Finish.LENGTH):
            return self._hand_over(output)
        return self._tokens(output, final=output.finish is not None)

    def _fail(self, error: StreamError) -> Append:
        frame = Frame(TERMINAL, [], finish=Finish.ERROR, error=error)
        return self._entry(TERMINAL, 0, frame, final=True)

    def _tokens(self, output: Output, *, final: bool) -> Append | None:
        known = min(self._next - self._at, len(output.tokens))
        expected = self._run.emitted[self._at : self._at + known]
        self._at += len(output.tokens)
        ended_early = final and self._at < self._next and output.finish is not Finish.ABORT
        if output.tokens[:known] != expected or ended_early:
            return self._fail(_DIVERGED)
        tokens = output.tokens[known:]
        if known and not tokens and not final:
            return None
        frame = Frame(
            self._next,
            tokens,
            finish=output.finish if final else None,
            stop_reason=output.stop_reason,
            usage=None if self._run.emitted else output.usage,
            logprobs=_beyond(output.logprobs, known),
            prompt_logprobs=None if self._run.emitted else output.prompt_logprobs,
        )
        entry = self._entry(self._next, len(tokens), frame, final=final)
        self._next += len(tokens)
        return entry

    def _hand_over(self, output: Output) -> Append | None:
        """The prefill is done: pass it on, with its first token where decode can go on from there."""
        if not self._shares_first_token:
            return self._with_work(self._entry(self._next, 0, None), Stage.DECODE, self._run.emitted, output)
        spent = remaining(self._record.sampling, self._next + len(output.tokens)).get("max_tokens") == 0
        final = output.finish is Finish.STOP or spent
        entry = self._tokens(output, final=final)
        stage = Stage.RELEASE if final else Stage.DECODE
        return entry and self._with_work(entry, stage, self._run.emitted + output.tokens, output)

    def _with_work(self, entry: Append, stage: Stage, emitted: list[int], output: Output) -> Append:
        run = Run(
            self.request_id,
            stage,
            self._run.record,
            emitted,
            kv=output.kv,
            replay=self._run.replay,
            kv_until_ms=now_ms() + int(KV_TRUST_S * 1000),
        )
        return msgspec.structs.replace(entry, hand_over=self._run.hand_over, work=lua_string(encode(run)))


def _beyond(logprobs: Logprobs | None, known: int) -> Logprobs | None:
    """Without the rows of the first ``known`` tokens."""
    if logprobs is None or not known:
        return logprobs
    row = 4 * logprobs.width * known
    return Logprobs(logprobs.width, logprobs.token_ids[row:], logprobs.logprobs[row:], logprobs.ranks[4 * known :])


def first_token_from_prefill(record: Record, emitted: int, block_size: int) -> bool:
    """Whether the prefill replica's token may be delivered, and decode continue after it.

    Not for sampling that depends on more than the tokens. Not when the prompt fills its last block exactly: the token
    would open a block that the prefill replica does not have, NIXL would load one block too few, and the
    bad block would stay in the prefix cache. Decode then samples the first token itself from the transferred cache.
    """
    return (record.num_tokens + emitted) % block_size != 0 and continuable(record.sampling)
