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
from penstock.queue.records import encode_record, now_ms
from penstock.queue.token_log import Append
from penstock.workers.engine import KV_LEASE_S, Output
from penstock.workers.stream import Stream
from tests.support.requests import make_record

pytestmark = pytest.mark.unit

BLOCK = 4
PLAIN = {"max_tokens": 8}


def make_stream(
    stage: Stage, prompt: int = 5, emitted: list[int] | None = None, *, replay: bool = False, **sampling: Any
) -> Stream:
    record = make_record(prompt, sampling=sampling or PLAIN, id="r")
    raw = msgspec.Raw(encode_record(record))
    run = Run("r", stage, raw, emitted or [], "decode-1" if stage is Stage.PREFILL else None, replay=replay)
    return Stream(run, record, 3, BLOCK)


def made(stream: Stream, output: Output) -> Append:
    entry = stream.append(output)
    assert entry is not None
    return entry


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
        made(stream, Output("r:3", [1, 2])),
        made(stream, Output("r:3", [3])),
        made(stream, Output("r:3", [4], Finish.STOP, 2)),
    ]
    assert [(e.id, e.attempt, e.index, e.count, e.final) for e in entries] == [
        ("r", 3, 2, 2, False), ("r", 3, 4, 1, False), ("r", 3, 5, 1, True),
    ]  # fmt: skip
    assert [frame(e) for e in entries] == [
        Frame(2, [1, 2]), Frame(4, [3]), Frame(5, [4], finish=Finish.STOP, stop_reason=2),
    ]  # fmt: skip


def test_usage_is_told_with_the_first_token_of_all() -> None:
    output = Output("r:3", [1], usage=Usage(5))
    assert frame(made(make_stream(Stage.WHOLE), output)).usage == Usage(5)
    assert frame(made(make_stream(Stage.WHOLE, emitted=[9]), output)).usage is None


def test_log_probabilities_travel_along() -> None:
    some = Logprobs(1, b"abcd", b"efgh", b"ijkl")
    entry = made(make_stream(Stage.WHOLE), Output("r:3", [1], logprobs=some, prompt_logprobs=some))
    assert (frame(entry).logprobs, frame(entry).prompt_logprobs) == (some, some)


def test_abort_ends_at_its_position() -> None:
    entry = made(make_stream(Stage.PREFILL), Output("r:3", [], Finish.ABORT))
    assert (entry.final, entry.hand_over, frame(entry)) == (True, None, Frame(0, [], finish=Finish.ABORT))


def test_error_is_typed() -> None:
    error = StreamError("invalid_record", "too long", 400)
    entry = made(make_stream(Stage.WHOLE), Output("r:3", [], error=error))
    assert (entry.index, entry.final) == (TERMINAL, True)
    assert frame(entry).error == error


def test_failure_of_the_engine_is_given_back() -> None:
    """Another replica may do better: no error for the client yet."""
    broken = StreamError("engine_failed", "broken", 500, retryable=True)
    for output in (Output("r:3", [1], Finish.ERROR), Output("r:3", [], error=broken)):
        entry = made(make_stream(Stage.WHOLE, emitted=[9]), output)
        assert (entry.back, entry.index, entry.final, payload(entry.frame)) == ("failed", 1, False, b"")


def test_prefill_hands_its_token_over() -> None:
    output = Output("r:3", [7], Finish.LENGTH, usage=Usage(5), kv={"block": 1})
    entry = made(make_stream(Stage.PREFILL), output)
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
    entry = made(stream, Output("r:3", [7], Finish.LENGTH, kv={"block": 1}))
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
    entry = made(stream, Output("r:3", [7], finish, kv={"block": 1}))
    assert (entry.final, frame(entry).finish) == (True, finish)
    assert handed(entry).stage is Stage.RELEASE


def test_job_carries_the_attempt() -> None:
    job = make_stream(Stage.WHOLE, emitted=[1]).job()
    assert (job.id, job.stage, job.emitted) == ("r:3", Stage.WHOLE, [1])


def replay(*emitted: int, stage: Stage = Stage.WHOLE) -> Stream:
    return make_stream(stage, emitted=list(emitted), replay=True, seed=1, max_tokens=8)


def test_replay_runs_from_the_prompt() -> None:
    assert replay(1, 2, 3).job().emitted == []


def test_replay_appends_what_lies_beyond_the_log() -> None:
    """Also from the middle of a step, with the log probabilities of what is new."""
    stream = replay(1, 2, 3)
    assert stream.append(Output("r:3", [1, 2], usage=Usage(5))) is None
    rows = Logprobs(2, bytes(range(24)), bytes(range(24, 48)), bytes(range(12)))
    entry = made(stream, Output("r:3", [3, 4, 5], usage=Usage(5), logprobs=rows, prompt_logprobs=rows))
    new = Logprobs(2, bytes(range(8, 24)), bytes(range(32, 48)), bytes(range(4, 12)))
    assert (entry.index, entry.count, frame(entry)) == (3, 2, Frame(3, [4, 5], logprobs=new))
    assert frame(made(stream, Output("r:3", [6], Finish.STOP, 6))) == Frame(5, [6], finish=Finish.STOP, stop_reason=6)


@pytest.mark.parametrize(
    "output",
    [Output("r:3", [1, 9]), Output("r:3", [1, 2, 9, 4]), Output("r:3", [1], Finish.STOP)],
    ids=["another token", "another token at the seam", "an earlier end"],
)
def test_replay_that_differs_is_a_typed_error(output: Output) -> None:
    entry = made(replay(1, 2, 3), output)
    error = frame(entry).error
    assert error is not None
    assert (error.code, entry.index, entry.final) == ("stream_interrupted", TERMINAL, True)


def test_replay_that_is_cancelled_behind_the_log_ends_there() -> None:
    entry = made(replay(1, 2, 3), Output("r:3", [], Finish.ABORT))
    assert frame(entry) == Frame(3, [], finish=Finish.ABORT)


def test_replay_hands_over_as_a_replay() -> None:
    entry = made(replay(1, 2, stage=Stage.PREFILL), Output("r:3", [1], Finish.LENGTH, kv={"block": 1}))
    run = handed(entry)
    assert (entry.index, entry.count, payload(entry.frame)) == (2, 0, b"")
    assert (run.stage, run.emitted, run.replay) == (Stage.DECODE, [1, 2], True)


def test_transferred_cache_is_used_while_its_lease_lasts() -> None:
    record = make_record(5, sampling=PLAIN, id="r")
    raw = msgspec.Raw(encode_record(record))
    for until, expired in ((now_ms() + 60_000, False), (now_ms() - 1, True)):
        run = Run("r", Stage.DECODE, raw, [7], kv={"block": 1}, kv_until_ms=until)
        stream = Stream(run, record, 3, BLOCK)
        assert (stream.transfers, stream.kv_expired) == (True, expired)
    again = stream.recompute()
    assert (again.kv, again.emitted, again.id, stream.transfers) == (None, [7], "r:3r", False)


def test_hand_over_says_how_long_it_is_good() -> None:
    before = now_ms()
    run = handed(made(make_stream(Stage.PREFILL), Output("r:3", [7], Finish.LENGTH, kv={"block": 1})))
    assert before < run.kv_until_ms < now_ms() + KV_LEASE_S * 1000
