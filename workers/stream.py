"""One request running in this replica: turns what the engine produced into entries of the token log."""

from __future__ import annotations

import msgspec

from penstock.queue.messages import TERMINAL, Finish, Frame, Run, Stage, StreamError, encode, lua_string
from penstock.queue.records import Record
from penstock.queue.token_log import Append
from penstock.workers.engine import Job, Output
from penstock.workers.sampling import continuable, remaining

_ENGINE_ERROR = StreamError("engine_failed", "the engine failed on this request; try again", 500, retryable=True)


class Stream:
    """Position and attempt of one running request. Built by the inbox thread, then used by the writer thread alone."""

    def __init__(self, run: Run, record: Record, attempt: int, block_size: int) -> None:
        self.request_id = run.id
        self.attempt = attempt
        self.job_id = f"{run.id}:{attempt}"
        self.stage = run.stage
        self._run = run
        self._record = record
        self._next = len(run.emitted)
        self._shares_first_token = first_token_from_prefill(record, len(run.emitted), block_size)

    def job(self) -> Job:
        """The request as the engine sees it. Its id holds the attempt, so that two attempts can meet in one engine."""
        return Job(self.job_id, self.stage, self._record, self._run.emitted, self._run.kv)

    def append(self, output: Output) -> Append:
        """The log entry for one step's output."""
        if output.error is not None or output.finish is Finish.ERROR:
            return self._fail(output.error or _ENGINE_ERROR)
        if self.stage is Stage.PREFILL and output.finish in (Finish.STOP, Finish.LENGTH):
            return self._hand_over(output)
        return self._tokens(output, final=output.finish is not None)

    def _fail(self, error: StreamError) -> Append:
        frame = Frame(TERMINAL, [], finish=Finish.ERROR, error=error)
        return Append(self.request_id, self.attempt, TERMINAL, 0, lua_string(encode(frame)), True)

    def _tokens(self, output: Output, *, final: bool) -> Append:
        frame = Frame(
            self._next,
            output.tokens,
            finish=output.finish if final else None,
            stop_reason=output.stop_reason,
            usage=None if self._run.emitted else output.usage,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
        )
        entry = Append(self.request_id, self.attempt, self._next, len(output.tokens), lua_string(encode(frame)), final)
        self._next += len(output.tokens)
        return entry

    def _hand_over(self, output: Output) -> Append:
        """The prefill is done: pass it on, with its first token where decode can go on from there."""
        if not self._shares_first_token:
            nothing = Append(self.request_id, self.attempt, self._next, 0, lua_string(b""), False)
            return self._with_work(nothing, Stage.DECODE, self._run.emitted, output)
        spent = remaining(self._record.sampling, self._next + len(output.tokens)).get("max_tokens") == 0
        final = output.finish is Finish.STOP or spent
        entry = self._tokens(output, final=final)
        stage = Stage.RELEASE if final else Stage.DECODE
        return self._with_work(entry, stage, self._run.emitted + output.tokens, output)

    def _with_work(self, entry: Append, stage: Stage, emitted: list[int], output: Output) -> Append:
        run = Run(self.request_id, stage, self._run.record, emitted, kv=output.kv)
        work = lua_string(encode(run))
        return msgspec.structs.replace(entry, hand_over=self._run.hand_over, work=work)


def first_token_from_prefill(record: Record, emitted: int, block_size: int) -> bool:
    """Whether the prefill replica's token may be delivered, and decode continue after it.

    Not for sampling that depends on more than the tokens. Not when the prompt fills its last block exactly: the token
    would open a block that the prefill replica does not have, NIXL would load one block too few, and the
    bad block would stay in the prefix cache. Decode then samples the first token itself from the transferred cache.
    """
    return (record.num_tokens + emitted) % block_size != 0 and continuable(record.sampling)
