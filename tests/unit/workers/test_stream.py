"""From an engine's outputs to entries of the token log."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.queue.messages import (
    TERMINAL,
    Finish,
    Frame,
    Logprobs,
    Run,
    Stage,
    StreamError,
    Usage,
    decode_frame,
)
from penstock.queue.records import encode_record
from penstock.queue.token_log import Append
from penstock.workers.engine import Output
from penstock.workers.stream import Stream
from tests.support.requests import make_record

pytestmark = pytest.mark.unit

BLOCK = 4
PLAIN = {"max_tokens": 8}


def make_stream(stage: Stage, prompt: int = 5, emitted: list[int] | None = None, **sampling: Any) -> Stream:
    record = make_record(prompt, sampling=sampling or PLAIN, id="r")
    raw = msgspec.Raw(encode_record(record))
    run = Run("r", stage, raw, emitted or [], "decode-1" if stage is Stage.PREFILL else None)
    return Stream(run, record, 3, BLOCK)


def payload(data: msgspec.Raw | None) -> bytes:
    """What the script sees of a Lua string."""
    assert data is not None
    return bytes(data)[5:]


def frame(entry: Append) -> Frame:
    return decode_frame(payload(entry.frame))


def handed(entry: Append) -> Run:
    return msgspec.msgpack.decode(payload(entry.work), type=Run)


def test_positions_follow_the_tokens() -> None:
    stream = make_stream(Stage.WHOLE, emitted=[9, 9])
    entries = [
        stream.append(Output("r:3", [1, 2])),
        stream.append(Output("r:3", [3])),
        stream.append(Output("r:3", [4], Finish.STOP, 2)),
    ]
    assert [(e.id, e.attempt, e.index, e.count, e.final) for e in entries] == [
        ("r", 3, 2, 2, False), ("r", 3, 4, 1, False), ("r", 3, 5, 1, True),
    ]  # fmt: skip
    assert [frame(e) for e in entries] == [
        Frame(2, [1, 2]), Frame(4, [3]), Frame(5, [4], finish=Finish.STOP, stop_reason=2),
    ]  # fmt: skip


def test_usage_is_told_with_the_first_token_of_all() -> None:
    output = Output("r:3", [1], usage=Usage(5))
    assert frame(make_stream(Stage.WHOLE).append(output)).usage == Usage(5)
    assert frame(make_stream(Stage.WHOLE, emitted=[9]).append(output)).usage is None


def test_log_probabilities_travel_along() -> None:
    some = Logprobs(1, b"abcd", b"efgh", b"ijkl")
    entry = make_stream(Stage.WHOLE).append(Output("r:3", [1], logprobs=some, prompt_logprobs=some))
    assert (frame(entry).logprobs, frame(entry).prompt_logprobs) == (some, some)


def test_abort_ends_at_its_position() -> None:
    entry = make_stream(Stage.PREFILL).append(Output("r:3", [], Finish.ABORT))
    assert (entry.final, entry.hand_over, frame(entry)) == (True, None, Frame(0, [], finish=Finish.ABORT))


def test_error_is_typed() -> None:
    error = StreamError("invalid_record", "too long", 400)
    entry = make_stream(Stage.WHOLE).append(Output("r:3", [], error=error))
    assert (entry.index, entry.final) == (TERMINAL, True)
    assert frame(entry).error == error
    unnamed = frame(make_stream(Stage.PREFILL).append(Output("r:3", [1], Finish.ERROR)))
    assert unnamed.error is not None
    assert (unnamed.error.code, unnamed.error.retryable, unnamed.tokens) == ("engine_failed", True, [])


def test_prefill_hands_its_token_over() -> None:
    output = Output("r:3", [7], Finish.LENGTH, usage=Usage(5), kv={"block": 1})
    entry = make_stream(Stage.PREFILL).append(output)
    assert frame(entry) == Frame(0, [7], usage=Usage(5))
    assert (entry.hand_over, entry.final) == ("decode-1", False)
    run = handed(entry)
    assert (run.stage, run.emitted, run.kv, run.hand_over) == (Stage.DECODE, [7], {"block": 1}, None)


@pytest.mark.parametrize(
    "stream",
    [
        make_stream(Stage.PREFILL, prompt=8),
        make_stream(Stage.PREFILL, prompt=6, emitted=[1, 2]),
        make_stream(Stage.PREFILL, seed=1, max_tokens=8),
    ],
    ids=["whole blocks", "whole blocks with what was emitted", "seed"],
)
def test_prefill_keeps_a_token_that_cannot_be_shared(stream: Stream) -> None:
    entry = stream.append(Output("r:3", [7], Finish.LENGTH, kv={"block": 1}))
    assert (payload(entry.frame), entry.count, entry.final) == (b"", 0, False)
    assert (handed(entry).stage, 7 in handed(entry).emitted) == (Stage.DECODE, False)


@pytest.mark.parametrize(
    ("stream", "finish"),
    [
        (make_stream(Stage.PREFILL), Finish.STOP),
        (make_stream(Stage.PREFILL, max_tokens=1), Finish.LENGTH),
        (make_stream(Stage.PREFILL, prompt=4, emitted=list(range(15)), temperature=0.5), Finish.LENGTH),
    ],
    ids=["stop token", "limit", "default limit"],
)
def test_prefill_that_is_all_releases_the_cache(stream: Stream, finish: Finish) -> None:
    entry = stream.append(Output("r:3", [7], finish, kv={"block": 1}))
    assert (entry.final, frame(entry).finish) == (True, finish)
    assert handed(entry).stage is Stage.RELEASE


def test_job_carries_the_attempt() -> None:
    job = make_stream(Stage.WHOLE, emitted=[1]).job()
    assert (job.id, job.stage, job.emitted) == ("r:3", Stage.WHOLE, [1])
