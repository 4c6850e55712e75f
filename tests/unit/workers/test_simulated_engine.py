"""The simulated engine: exact tokens, exact blocks, vLLM's scheduling, transfers between engines."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.queue.errors import InvalidRecord
from penstock.queue.messages import Finish, Usage
from penstock.queue.records import PriorityClass
from penstock.queue.settings import ModelSettings
from penstock.workers.engine import Engine, Load
from penstock.workers.settings import WorkerSettings
from penstock.workers.simulated.engine import SimulatedEngine
from penstock.workers.simulated.step_times import step_times
from penstock.workers.simulated.tokens import expected_tokens
from tests.unit.workers.simulated_engines import (
    PROMPT,
    TIMED,
    Clock,
    MakeEngine,
    make_job,
    prefill,
    run,
    submit,
    tokens_of,
)

pytestmark = pytest.mark.unit


def test_is_an_engine(engines: MakeEngine) -> None:
    engine: Engine = engines()
    assert engine.info.kv_tokens == 96
    assert not engine.has_work()
    assert engine.step() == ([], False)


def test_whole_answer(engines: MakeEngine) -> None:
    engine = engines()
    submit(engine, make_job("r", PROMPT, max_tokens=8))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == expected_tokens(PROMPT, 8)
    assert [output.finish for output in outputs] == [None] * 7 + [Finish.LENGTH]
    assert [output.usage for output in outputs] == [Usage(len(PROMPT)), *[None] * 7]
    assert not engine.has_work()
    assert engine.used_blocks == 0


def test_continues_what_was_emitted(engines: MakeEngine) -> None:
    engine = engines()
    expected = expected_tokens(PROMPT, 8)
    submit(engine, make_job("r", PROMPT, emitted=expected[:5], max_tokens=8))
    assert tokens_of(run(engine)["r"]) == expected[5:]


@pytest.mark.parametrize(("min_tokens", "length"), [(0, 4), (4, 4), (5, 8)])
def test_stop_token(engines: MakeEngine, min_tokens: int, length: int) -> None:
    engine = engines()
    expected = expected_tokens(PROMPT, 8)
    stop = expected[3]
    submit(engine, make_job("r", PROMPT, max_tokens=8, stop_token_ids=[stop], min_tokens=min_tokens))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == expected[:length]
    stopped = length == 4
    assert outputs[-1].finish is (Finish.STOP if stopped else Finish.LENGTH)
    assert outputs[-1].stop_reason == (stop if stopped else None)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (make_job("r", [], max_tokens=1), "empty"),
        (make_job("r", [1] * 60, max_tokens=5), "context"),
        (make_job("r", [1], emitted=[2, 3], max_tokens=2), "nothing left"),
    ],
)
def test_refuses(engines: MakeEngine, job: Any, reason: str) -> None:
    with pytest.raises(InvalidRecord, match=reason):
        engines().prepare(job)


@pytest.mark.parametrize("limits", [{"max_num_seqs": 17}, {"num_gpu_blocks_override": 15}])
def test_contradicting_limits(engines: MakeEngine, limits: dict[str, int]) -> None:
    with pytest.raises(msgspec.ValidationError, match="must"):
        engines(**limits)


def test_other_engine_arguments_are_left_aside() -> None:
    model = ModelSettings(path="m", max_model_len=128, engine_args={"enforce_eager": True, "block_size": 32})
    engine = SimulatedEngine(model, WorkerSettings(), "mixed")
    assert (engine.info.max_model_len, engine.info.block_size) == (128, 32)
    engine.shutdown()


@pytest.mark.parametrize(
    ("other", "cached"),
    [({}, 8), ({"tenant": "u"}, 0), ({"cache_salt": "s"}, 0)],
    ids=["same tenant", "other tenant", "other salt"],
)
def test_prefix_cache(engines: MakeEngine, other: dict[str, Any], cached: int) -> None:
    engine = engines()
    submit(engine, make_job("a", PROMPT, max_tokens=2))
    run(engine)
    submit(engine, make_job("b", [*PROMPT, 7], max_tokens=2, **other))
    assert run(engine)["b"][0].usage == Usage(len(PROMPT) + 1, cached)


def test_last_prompt_token_is_always_computed(engines: MakeEngine) -> None:
    engine = engines()
    for id_ in "ab":
        submit(engine, make_job(id_, [3] * 8, max_tokens=1))
    outputs = run(engine)
    assert [outputs[id_][0].usage for id_ in "ab"] == [Usage(8, 0), Usage(8, 4)]


def test_generated_blocks_are_cached_too(engines: MakeEngine) -> None:
    engine = engines()
    submit(engine, make_job("a", PROMPT, max_tokens=10))
    run(engine)
    submit(engine, make_job("b", PROMPT + expected_tokens(PROMPT, 10), max_tokens=2))
    first = run(engine)["b"][0]
    assert first.usage == Usage(20, 16)


def test_long_prompt_is_computed_in_chunks(engines: MakeEngine) -> None:
    engine = engines()
    submit(engine, make_job("r", [5] * 40, max_tokens=1))
    assert [len(engine.step()[0]) for _ in range(3)] == [0, 0, 1]


def test_running_requests_come_before_prefill(engines: MakeEngine) -> None:
    engine = engines()
    submit(engine, make_job("a", [1], max_tokens=20))
    engine.step()
    submit(engine, make_job("b", [2] * 40, max_tokens=1))
    produced = [[output.id for output in engine.step()[0]] for _ in range(3)]
    assert produced == [["a"], ["a"], ["a", "b"]]


def test_urgent_class_is_admitted_first(engines: MakeEngine) -> None:
    engine = engines(max_num_seqs=1)
    for id_, cls in (
        ("b", PriorityClass.BATCH),
        ("s", PriorityClass.STANDARD),
        ("i", PriorityClass.INTERACTIVE),
    ):
        submit(engine, make_job(id_, PROMPT, cls=cls, max_tokens=3))
    assert engine.load() == Load(0, 3, 0)
    assert list(run(engine)) == ["i", "s", "b"]


def test_preempts_the_least_urgent_and_loses_nothing(engines: MakeEngine) -> None:
    engine = engines(num_gpu_blocks_override=16)
    prompts = {"batch": [1] * 8, "first": [2] * 8, "second": [3] * 8}
    classes = {"batch": PriorityClass.BATCH}
    for id_, prompt in prompts.items():
        submit(engine, make_job(id_, prompt, cls=classes.get(id_, PriorityClass.STANDARD), max_tokens=24))
    outputs: dict[str, list[Any]] = {id_: [] for id_ in prompts}
    waited = set()
    while engine.has_work():
        produced, _ = engine.step()
        for output in produced:
            outputs[output.id].append(output)
        if engine.load().waiting:
            waited |= set(prompts) - {output.id for output in produced}
    assert waited == {"batch"}
    for id_, prompt in prompts.items():
        assert tokens_of(outputs[id_]) == expected_tokens(prompt, 24)
        assert [output.usage is None for output in outputs[id_]] == [False, *[True] * 23]


def test_step_takes_the_time_of_the_profile(engines: MakeEngine, clock: Clock) -> None:
    engine = engines(TIMED)
    times = step_times(TIMED)
    submit(engine, make_job("r", PROMPT, max_tokens=3))
    durations = []
    while engine.has_work():
        started = clock.now
        engine.step()
        durations.append(clock.now - started)
    expected = [times.step_s(10, 100, 0, 0), times.step_s(0, 0, 1, 10), times.step_s(0, 0, 1, 11)]
    assert durations == pytest.approx(expected, abs=1e-6)


def test_chunks_take_the_time_of_the_context_they_attend_to(engines: MakeEngine, clock: Clock) -> None:
    engine = engines(TIMED, max_num_batched_tokens=1024, num_gpu_blocks_override=1024, max_model_len=4096)
    times = step_times(TIMED)
    submit(engine, make_job("r", [9] * 2500, max_tokens=1))
    for start, end in ((0, 1024), (1024, 2048), (2048, 2500)):
        before = clock.now
        engine.step()
        expected = times.step_s(end - start, end**2 - start**2, 0, 0)
        assert clock.now - before == pytest.approx(expected, abs=1e-6)


def test_preempted_request_drops_out_of_the_step(engines: MakeEngine, clock: Clock) -> None:
    engine = engines(TIMED, num_gpu_blocks_override=16, max_num_batched_tokens=64)
    submit(engine, make_job("batch", [1] * 29, cls=PriorityClass.BATCH, max_tokens=16))
    engine.step()
    submit(engine, make_job("urgent", [2] * 31, cls=PriorityClass.INTERACTIVE, max_tokens=16))
    engine.step()
    engine.step()
    before = clock.now
    assert [output.id for output in engine.step()[0]] == ["urgent"]
    assert clock.now - before == pytest.approx(step_times(TIMED).step_s(0, 0, 1, 32), abs=1e-6)
    assert engine.load().waiting == 1
    assert tokens_of(run(engine)["batch"])[-1:] == expected_tokens([1] * 29, 16)[-1:]


def test_instant_never_sleeps(engines: MakeEngine, clock: Clock) -> None:
    engine = engines()
    submit(engine, make_job("r", PROMPT, max_tokens=8))
    started = clock.now
    run(engine)
    assert clock.now == started


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["waiting", "in the prompt", "decoding"])
def test_abort(engines: MakeEngine, steps: int) -> None:
    engine = engines()
    submit(engine, make_job("r", [4] * 20, max_tokens=8))
    submit(engine, make_job("s", PROMPT, max_tokens=8))
    for _ in range(steps):
        engine.step()
    engine.abort(["r", "unknown", "r"])
    assert set(run(engine)) == {"s"}
    assert engine.used_blocks == 0


def test_same_id_again_replaces_the_first(engines: MakeEngine) -> None:
    engine = engines()
    prefill(engine)
    prefill(engine)
    assert engine.used_blocks == 3
