"""KV caches that move from one simulated engine to another."""

from __future__ import annotations

import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from penstock.queue.messages import Finish, Stage, Usage
from penstock.workers.engine import Load
from penstock.workers.simulated.releases import KV_LEASE_S
from penstock.workers.simulated.step_times import step_times
from penstock.workers.simulated.tokens import expected_tokens
from tests.unit.workers.simulated_engines import (
    PROMPT,
    TIMED,
    Clock,
    MakeEngine,
    decode_elsewhere,
    make_job,
    prefill,
    run,
    submit,
    tokens_of,
)

pytestmark = pytest.mark.unit


def decode_job(kv: dict[str, Any] | None, stage: Stage = Stage.DECODE) -> Any:
    return make_job("r", PROMPT, stage=stage, emitted=expected_tokens(PROMPT, 1), kv=kv, max_tokens=8)


def test_prefill_then_decode(engines: MakeEngine, clock: Clock) -> None:
    source, target = engines(TIMED, role="prefill"), engines(TIMED, role="decode")
    kv = prefill(source)
    assert (kv["tokens"], kv["blocks"], source.used_blocks) == (10, 3, 3)
    submit(target, decode_job(kv))
    assert target.step() == ([], False)
    assert target.load() == Load(1, 0, 12)
    assert source.step() == ([], False)
    assert source.used_blocks == 3
    clock.sleep(step_times(TIMED).transfer_s(10))
    outputs = run(target)["r"]
    assert tokens_of(outputs) == expected_tokens(PROMPT, 8)[1:]
    assert outputs[0].usage == Usage(10, 0, 10)
    source.step()
    assert source.used_blocks == 0
    assert not source.has_work()


def test_transfers_share_one_link(engines: MakeEngine, clock: Clock) -> None:
    source, target = engines(TIMED, role="prefill"), engines(TIMED, role="decode")
    for id_ in "ab":
        kv = prefill(source, id_)
        submit(target, make_job(id_, PROMPT, stage=Stage.DECODE, kv=kv, tenant=id_, max_tokens=8))
    target.step()
    clock.sleep(step_times(TIMED).transfer_s(10))
    assert [output.id for output in target.step()[0]] == ["a"]


def test_loading_requests_count_as_sequences(engines: MakeEngine) -> None:
    source, target = engines(TIMED), engines(TIMED, max_num_seqs=1)
    submit(target, decode_job(prefill(source)))
    target.step()
    submit(target, make_job("s", PROMPT, max_tokens=1))
    assert target.step() == ([], False)
    assert target.load() == Load(1, 1, 12)
    target.abort(["r"])
    assert list(run(target)) == ["s"]


def test_decode_samples_the_first_token_itself(engines: MakeEngine) -> None:
    source, target = engines(), engines()
    kv = prefill(source)
    submit(target, make_job("r", PROMPT, stage=Stage.DECODE, kv=kv, max_tokens=8))
    outputs = run(target)["r"]
    assert tokens_of(outputs) == expected_tokens(PROMPT, 8)
    assert outputs[0].usage == Usage(10, 0, 9)


def test_decode_takes_from_its_own_cache_first(engines: MakeEngine) -> None:
    source, target = engines(), engines()
    submit(target, make_job("earlier", PROMPT, max_tokens=1))
    run(target)
    submit(target, decode_job(prefill(source)))
    assert run(target)["r"][0].usage == Usage(10, 8, 2)


def test_stopped_prefill_holds_nothing(engines: MakeEngine) -> None:
    engine = engines()
    stop = expected_tokens(PROMPT, 1)
    submit(engine, make_job("r", PROMPT, stage=Stage.PREFILL, max_tokens=8, stop_token_ids=stop))
    (output,) = run(engine)["r"]
    assert (output.finish, output.kv) == (Finish.STOP, None)
    assert engine.used_blocks == 0


def test_decode_without_parameters_computes_all(engines: MakeEngine) -> None:
    engine = engines()
    submit(engine, decode_job(None))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == expected_tokens(PROMPT, 8)[1:]
    assert outputs[0].usage == Usage(10)


def test_mismatched_parameters_are_computed(engines: MakeEngine) -> None:
    """Of another kind of engine, in a fleet that is being replaced."""
    engine = engines()
    submit(engine, decode_job({"remote_engine_id": 1}))
    outputs = run(engine)["r"]
    assert (tokens_of(outputs), outputs[0].usage) == (expected_tokens(PROMPT, 8)[1:], Usage(10))


def test_prefill_engine_that_is_gone(engines: MakeEngine) -> None:
    """Its process ended with the blocks unread: computed here, and nothing waits for anything."""
    source, target = engines(), engines()
    kv = prefill(source)
    source.shutdown()
    submit(target, decode_job(kv))
    outputs = run(target)["r"]
    assert (tokens_of(outputs), outputs[0].usage) == (expected_tokens(PROMPT, 8)[1:], Usage(10))
    assert target.used_blocks == 0


def test_every_second_transfer_fails(engines: MakeEngine) -> None:
    source, target = engines(), engines(kv_load_fails_every=2)
    transferred = []
    for number in range(4):
        prompt = [number * 10 + k for k in range(10)]
        submit(source, make_job("r", prompt, stage=Stage.PREFILL, max_tokens=8))
        (output,) = run(source)["r"]
        emitted = expected_tokens(prompt, 1)
        submit(target, make_job("r", prompt, stage=Stage.DECODE, emitted=emitted, kv=output.kv, max_tokens=8))
        outputs = run(target)["r"]
        assert tokens_of(outputs) == expected_tokens(prompt, 8)[1:]
        assert outputs[0].usage is not None
        transferred.append(outputs[0].usage.transferred_tokens)
    assert transferred == [10, 0, 10, 0]
    source.step()
    assert source.used_blocks == target.used_blocks == 0


def test_unread_blocks_are_freed_by_their_lease(engines: MakeEngine, clock: Clock) -> None:
    source, target = engines(), engines()
    kv = prefill(source)
    clock.sleep(KV_LEASE_S - 1)
    source.step()
    assert source.used_blocks == 3
    clock.sleep(1)
    source.step()
    assert source.used_blocks == 0
    submit(target, decode_job(kv))
    outputs = run(target)["r"]
    assert outputs[0].usage == Usage(10)
    assert tokens_of(outputs) == expected_tokens(PROMPT, 8)[1:]


def test_release_frees_unread_blocks(engines: MakeEngine) -> None:
    source, target = engines(), engines()
    submit(target, decode_job(prefill(source), Stage.RELEASE))
    assert not target.has_work()
    source.step()
    assert source.used_blocks == 0


def test_release_of_nothing_is_no_work(engines: MakeEngine) -> None:
    engine = engines()
    submit(engine, decode_job(None, Stage.RELEASE))
    assert not engine.has_work()


def test_only_the_right_release_counts(engines: MakeEngine) -> None:
    source, other = engines(), engines()
    kv = prefill(source)
    for wrong in ({"engine": "another"}, {"lease": kv["lease"] + 1}):
        submit(other, decode_job(kv | wrong, Stage.RELEASE))
    host, port = kv["address"].split(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"hello", (host, int(port)))
    source.step()
    assert source.used_blocks == 3


def test_abort_of_a_held_prefill(engines: MakeEngine) -> None:
    engine = engines()
    prefill(engine)
    engine.abort(["r"])
    assert engine.used_blocks == 0
    assert not engine.has_work()


@pytest.mark.parametrize("started", [False, True], ids=["waiting", "loading"])
def test_abort_before_the_transfer_is_over_frees_both_ends(engines: MakeEngine, *, started: bool) -> None:
    source, target = engines(TIMED), engines(TIMED)
    submit(target, decode_job(prefill(source)))
    if started:
        target.step()
        assert target.used_blocks == 3
    target.abort(["r"])
    source.step()
    assert (source.used_blocks, target.used_blocks) == (0, 0)


def test_decode_in_another_process(engines: MakeEngine) -> None:
    source = engines()
    kv = prefill(source)
    expected = expected_tokens(PROMPT, 8)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        tokens = pool.submit(decode_elsewhere, PROMPT, expected[:1], kv, 8).result()
    assert tokens == expected[1:]
    source.step()
    assert source.used_blocks == 0
