"""Add, step, hand over, abort, wait in any order: no block leaks, every request ends, tokens are exact."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.queue.messages import Finish, Stage
from penstock.queue.records import PriorityClass
from penstock.workers.engine import Job, Output
from penstock.workers.simulated.engine import SimulatedEngine
from penstock.workers.simulated.releases import KV_LEASE_S
from penstock.workers.simulated.tokens import expected_tokens
from tests.unit.workers.simulated_engines import Clock, make_engine, make_job

pytestmark = pytest.mark.unit

DRAIN_STEPS = 5_000
"""Far more than the steps all requests of one run can need."""


class Engines(RuleBasedStateMachine):
    """A prefill and a decode engine with room for few requests, so that waiting and preemption are common."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.source = make_engine(self.clock, "h100/llama3.1-8b", num_gpu_blocks_override=18)
        self.target = make_engine(self.clock, "h100/llama3.1-8b", num_gpu_blocks_override=18)
        self.jobs: dict[str, Job] = {}
        self.tokens: dict[str, list[int]] = {}
        self.running: set[str] = set()
        self.handed: list[Job] = []

    def teardown(self) -> None:
        for _ in range(DRAIN_STEPS):
            self._step(self.source)
            self._step(self.target)
            if not (self.source.has_work() or self.target.has_work()):
                break
            self.clock.sleep(KV_LEASE_S / 100)
        used = self.source.used_blocks, self.target.used_blocks
        self.source.shutdown()
        self.target.shutdown()
        assert used == (0, 0)
        assert self.running == set()

    @rule(
        stage=st.sampled_from([Stage.WHOLE, Stage.PREFILL, Stage.PREFILL]),
        prompt=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=40),
        emitted=st.integers(0, 3),
        more=st.integers(1, 20),
        cls=st.sampled_from(PriorityClass),
        stop=st.booleans(),
    )
    def submit(
        self, stage: Stage, prompt: list[int], emitted: int, more: int, cls: PriorityClass, *, stop: bool
    ) -> None:
        expected = expected_tokens(prompt, emitted + more)
        stops = expected[-1:] if stop else []
        job = make_job(
            f"r{len(self.jobs)}",
            prompt,
            stage=stage,
            emitted=expected[:emitted],
            cls=cls,
            max_tokens=emitted + more,
            stop_token_ids=stops,
            min_tokens=emitted + more,
        )
        self.jobs[job.id] = job
        self.tokens[job.id] = list(job.emitted)
        self._start(self.source if stage is Stage.PREFILL else self.target, job)

    @precondition(lambda self: self.handed)
    @rule(
        data=st.data(),
        stage=st.sampled_from([Stage.DECODE, Stage.DECODE, Stage.RELEASE]),
        share=st.booleans(),
    )
    def hand_over(self, data: st.DataObject, stage: Stage, *, share: bool) -> None:
        """Decode continues after the prefill's token, samples that one itself, or only releases."""
        job = self.handed.pop(data.draw(st.integers(0, len(self.handed) - 1)))
        if not share:
            self.tokens[job.id].pop()
        job = job._replace(stage=stage, emitted=list(self.tokens[job.id]))
        if stage is Stage.RELEASE:
            self.target.add(self.target.prepare(job))
        else:
            self._start(self.target, job)

    @rule(steps=st.integers(1, 12), at_source=st.booleans())
    def step(self, steps: int, *, at_source: bool) -> None:
        for _ in range(steps):
            self._step(self.source if at_source else self.target)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.jobs)))
        self.source.abort([id_])
        self.target.abort([id_])
        self.running.discard(id_)
        self.handed = [job for job in self.handed if job.id != id_]

    @rule(seconds=st.sampled_from([1e-6, 1e-3, KV_LEASE_S / 2, KV_LEASE_S]))
    def wait(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    @invariant()
    def blocks_are_conserved(self) -> None:
        for engine in (self.source, self.target):
            kv = engine._kv
            references = Counter(block for request in engine._requests.values() for block in request.blocks)
            assert references == Counter({block: n for block, n in enumerate(kv._refs) if n})
            assert len(references) == engine.used_blocks
            assert sorted([*kv._blank, *kv._idle, *references]) == list(range(kv.num_blocks))
            assert {kv._hashes[block] for block in kv._by_hash.values()} == set(kv._by_hash)

    @invariant()
    def counts_agree(self) -> None:
        for engine in (self.source, self.target):
            load = engine.load()
            assert load.running <= engine.info.max_seqs
            assert load.running + load.waiting + len(engine._held) == len(engine._requests)

    def _start(self, engine: SimulatedEngine, job: Job) -> None:
        self.running.add(job.id)
        engine.add(engine.prepare(job))

    def _step(self, engine: SimulatedEngine) -> None:
        outputs, executed = engine.step()
        assert executed or not outputs
        for output in outputs:
            self._take(output)

    def _take(self, output: Output) -> None:
        assert output.id in self.running
        job, tokens = self.jobs[output.id], self.tokens[output.id]
        tokens += output.tokens
        assert tokens == expected_tokens(job.record.token_ids(), len(tokens))
        if output.finish is None:
            return
        self.running.remove(output.id)
        if output.kv is not None and len(tokens) < job.record.max_tokens:
            self.handed.append(job._replace(kv=output.kv))
        else:
            stopped = bool(job.record.sampling["stop_token_ids"])
            assert len(tokens) == job.record.max_tokens
            assert output.finish is (Finish.STOP if stopped else Finish.LENGTH)


TestEngines = Engines.TestCase
TestEngines.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
