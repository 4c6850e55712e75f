"""Simulated engines in virtual time, and jobs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.queue.messages import Finish, Stage
from penstock.queue.records import PriorityClass, Record, pack_tokens
from penstock.queue.settings import ModelSettings
from penstock.workers.engine import Job, Output
from penstock.workers.settings import WorkerSettings
from penstock.workers.simulated.engine import SimulatedEngine
from penstock.workers.simulated.tokens import expected_tokens

SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "num_gpu_blocks_override": 24,
    "max_model_len": 64,
}


class Clock:
    """Seconds that pass only when an engine sleeps or a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_engine(clock: Clock, profile: str = "instant", role: str = "mixed", **limits: int) -> SimulatedEngine:
    model = ModelSettings(path="simulated", engine_args=SMALL | limits)
    return SimulatedEngine(model, WorkerSettings(step_profile=profile), role, clock=clock, sleep=clock.sleep)


def make_job(
    id_: str,
    prompt: list[int],
    *,
    stage: Stage = Stage.WHOLE,
    emitted: list[int] | None = None,
    kv: dict[str, Any] | None = None,
    cls: PriorityClass = PriorityClass.STANDARD,
    tenant: str = "t",
    cache_salt: str | None = None,
    **sampling: Any,
) -> Job:
    record = Record(
        id=id_,
        model="m",
        pool="p",
        release="r0",
        tenant=tenant,
        priority_class=cls,
        num_tokens=len(prompt),
        prompt=pack_tokens(prompt),
        sampling=sampling,
        reply_to="i",
        accepted_ms=0,
        cache_salt=cache_salt,
    )
    return Job(id_, stage, record, emitted or [], kv)


def submit(engine: SimulatedEngine, job: Job) -> None:
    engine.add(engine.prepare(job))


def run(engine: SimulatedEngine, *, steps: int = 1000) -> dict[str, list[Output]]:
    """Step until every request has ended or is held; outputs by request."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(steps):
        produced, executed = engine.step()
        if not executed:
            return outputs
        for output in produced:
            outputs.setdefault(output.id, []).append(output)
    raise AssertionError(f"still running after {steps} steps")


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def decode_elsewhere(prompt: list[int], emitted: list[int], kv: dict[str, Any], max_tokens: int) -> list[int]:
    """Body of another process: continue a prefill there."""
    engine = make_engine(Clock(), role="decode")
    submit(engine, make_job("r", prompt, stage=Stage.DECODE, emitted=emitted, kv=kv, max_tokens=max_tokens))
    outputs = run(engine)["r"]
    engine.shutdown()
    assert outputs[-1].finish is Finish.LENGTH
    return tokens_of(outputs)


PROMPT = list(range(100, 110))
TIMED = "h100/llama3.1-8b"
MakeEngine = Callable[..., SimulatedEngine]


def prefill(engine: SimulatedEngine, id_: str = "r", **job: Any) -> dict[str, Any]:
    """Run the prefill of PROMPT; its transfer parameters."""
    submit(engine, make_job(id_, PROMPT, stage=Stage.PREFILL, **{"max_tokens": 8} | job))
    (output,) = run(engine)[id_]
    assert output.finish is Finish.LENGTH
    assert output.kv is not None
    assert output.tokens == expected_tokens(PROMPT, 1)
    return output.kv
