"""The life of requests in any order: published (twice), pulled, dispatched, run, cancelled, expired, resumed, while
replicas and dispatchers die. Whatever came before, a successor finishes all that was accepted, exactly.

The machine plays dispatcher and replica with their own parts (errand, inbox entries, stream) and decides who acts next;
queue and Redis are real. The invariants are those of docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Coroutine
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from penstock.queue.factory import open_queue
from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.messages import TERMINAL, Abort, Finish, Frame, Stage, StreamError, decode_inbound
from penstock.queue.protocol import Budget, RequestQueue
from penstock.queue.readers import Readers
from penstock.queue.records import Record, decode_record
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.settings import QueueSettings, RedisSettings
from penstock.queue.token_log import AppendStatus, DispatchStatus, RequestLog, TokenWriter, emitted_tokens
from penstock.workers.engine import Output
from penstock.workers.errand import Errand
from penstock.workers.simulated.tokens import expected_tokens
from penstock.workers.stream import Stream
from tests.support.requests import make_record

pytestmark = pytest.mark.contract

CHANNEL = "ingress:life"
TOKENS = 24
"""Of each answer: enough for several engines to have a part in it."""
PULL_S = {"redis": 0.05, "kafka": 0.5}
"""How long a pull may look for work when the machine does not know whether there is any."""
RECOVERY_S = 40.0
"""For a successor to finish everything: over the time in which a queue notices that a consumer is gone."""
EXPIRED = Frame(TERMINAL, [], finish=Finish.ERROR, error=StreamError("deadline_exceeded", "too late", 504))


class Running:
    """One attempt in one replica, and how far it has generated."""

    def __init__(self, stream: Stream, record: Record) -> None:
        self.stream = stream
        self.answer = expected_tokens(record.token_ids(), TOKENS)
        self.position = len(stream.job().emitted)

    def output(self, count: int) -> Output:
        """Its next tokens."""
        tokens = self.answer[self.position : self.position + count]
        self.position += len(tokens)
        finish = Finish.LENGTH if self.position == TOKENS else None
        return Output(self.stream.job_id, tokens, finish)


class LifeMachine(RuleBasedStateMachine):
    """``accepted`` and ``disturbed`` (cancelled or expired at some time) are all the machine remembers of requests;
    everything else is asked of queue and log."""

    def __init__(self, queue: QueueSettings, url: str) -> None:
        super().__init__()
        self.pool = uuid.uuid4().hex[:8]
        self.queue_settings = queue
        self.settings = RedisSettings(url=url, namespace=f"life{self.pool}:")
        self.loop = asyncio.new_event_loop()
        self.blocking = connect(self.settings)
        self.client = connect_async(self.settings)
        self.writer = TokenWriter(self.blocking, self.settings)
        self.log = RequestLog(self.client, self.settings)
        self.readers = Readers(self.client, self.settings, CHANNEL)
        self.publisher, self.consumer = self.open(), self.open()
        self.accepted: dict[str, Record] = {}
        self.disturbed: set[str] = set()
        self.errands: dict[str, Errand] = {}
        self.replicas: dict[str, dict[str, Running]] = {}
        self.live: list[str] = []
        self.read: dict[str, bytes] = {}
        self.names = (f"r{number}" for number in itertools.count())

    def open(self) -> RequestQueue:
        async def opened() -> RequestQueue:
            return open_queue(self.queue_settings, self.settings, self.pool)

        queue: RequestQueue = self.run(opened())
        return queue

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def request(self, which: int) -> str | None:
        return list(self.accepted)[which % len(self.accepted)] if self.accepted else None

    def rarely(self, which: int) -> str | None:
        """For what ends a life: mostly nobody."""
        return list(self.accepted)[which] if which < len(self.accepted) else None

    @initialize(seeds=st.lists(st.sampled_from([None, 7]), min_size=1, max_size=3))
    def begins(self, seeds: list[int | None]) -> None:
        """In the middle of life, where more can go wrong."""
        for seed in seeds:
            self.publish(seed)
        self.replica_starts()
        self.replica_starts()
        self.take(len(seeds), RECOVERY_S)
        for where, errand in enumerate(list(self.errands.values())):
            self.give(errand, self.live[where % 2])

    # -- ingress

    @rule(seed=st.sampled_from([None, 7]))
    def publish(self, seed: int | None) -> None:
        """Half of them cannot be continued, only replayed."""
        sampling = {"max_tokens": TOKENS} | ({} if seed is None else {"seed": seed})
        record = make_record(5, sampling=sampling, pool=self.pool, reply_to=CHANNEL)
        self.run(self.publisher.publish(record))
        self.accepted[record.id] = record

    @rule(which=st.integers(0, 9))
    def publish_again(self, which: int) -> None:
        """The acknowledgement was lost."""
        if (id_ := self.request(which)) is not None:
            self.run(self.publisher.publish(self.accepted[id_]))

    @rule(which=st.integers(0, 9), final=st.booleans())
    def cancel(self, which: int, final: bool) -> None:
        if (id_ := self.rarely(which)) is not None:
            ended = self.ended(id_)
            assert self.run(self.readers.cancel([id_], final=final)) == (not ended)
            if not ended:
                self.disturbed.add(id_)

    @rule(which=st.integers(0, 9))
    def resume(self, which: int) -> None:
        """A reader comes back: what was stopped because nobody read goes on."""
        if (id_ := self.request(which)) is None:
            return
        self.run(self.readers.attach([id_]))
        frames = self.run(self.log.read(id_))
        if frames and frames[-1].finish is Finish.ABORT:
            before = emitted_tokens(frames)
            self.run(self.readers.revive(id_, len(frames) - 1, b""))
            assert emitted_tokens(self.run(self.log.read(id_))) == before
            self.run(self.publisher.publish(self.accepted[id_]))

    # -- dispatcher

    @rule(requests=st.integers(1, 3))
    def pull(self, requests: int) -> None:
        self.take(requests, PULL_S[self.queue_settings.backend])

    def take(self, requests: int, within_s: float) -> None:
        async def pulled() -> None:
            try:
                async with asyncio.timeout(within_s):
                    deliveries = await self.consumer.pull(Budget(requests, 100_000))
            except TimeoutError:
                return
            for delivery in deliveries:
                known = self.errands.get(delivery.record.id)
                if known is None:
                    self.errands[delivery.record.id] = Errand(delivery)
                else:
                    known.deliveries.append(delivery)

        self.run(pulled())

    @rule(which=st.integers(0, 9), where=st.integers(0, 9))
    def dispatch(self, which: int, where: int) -> None:
        if self.errands and self.live:
            errand = list(self.errands.values())[which % len(self.errands)]
            self.give(errand, self.live[where % len(self.live)])

    def give(self, errand: Errand, replica: str) -> None:
        errand.stage, errand.target, errand.decode = Stage.WHOLE, replica, replica
        (answer,) = self.run(self.log.dispatch("dispatcher:life", [errand.dispatch()]))
        errand.attempt = max(errand.attempt, answer.attempt)
        if answer.status is DispatchStatus.EMITTED:
            errand.emitted = emitted_tokens(self.run(self.log.read(errand.id)))
            errand.deaths = answer.deaths
            assert len(errand.emitted) == answer.next
            self.give(errand, replica)
        elif answer.status is DispatchStatus.CANCELLED:
            self.run(self.log.finish([(errand.id, CHANNEL, Frame(TERMINAL, [], finish=Finish.ABORT))]))
            self.complete(errand)
        elif answer.status is DispatchStatus.DONE:
            self.complete(errand)

    @rule(which=st.integers(0, 9))
    def expire(self, which: int) -> None:
        """The deadline of something in the dispatcher's hands passes."""
        errand = self.errands.get(self.rarely(which) or "")
        if errand is not None:
            if self.run(self.log.finish([(errand.id, CHANNEL, EXPIRED)])) == [True]:
                self.disturbed.add(errand.id)
            self.complete(errand)

    def complete(self, errand: Errand) -> None:
        self.run(self.consumer.complete(errand.deliveries))
        del self.errands[errand.id]

    @rule()
    def dispatcher_dies(self) -> None:
        """Its successor knows only what queue and log tell."""
        self.run(self.consumer.close())
        self.errands.clear()
        self.consumer = self.open()

    # -- replicas

    @rule()
    def replica_starts(self) -> None:
        if len(self.live) < 3:
            name = next(self.names)
            self.live.append(name)
            self.replicas[name], self.read[name] = {}, b"0"
            self.blocking.set(f"{self.settings.namespace}replica:{name}", b"1")

    @rule(which=st.integers(0, 9), zombie=st.sampled_from([True, True, False]))
    def replica_dies(self, which: int, zombie: bool) -> None:
        """Its lease is gone, and what it had is given to another; a zombie works on, as one that was stopped does."""
        if len(self.live) < 2:
            return
        name = self.live.pop(which % len(self.live))
        self.blocking.delete(f"{self.settings.namespace}replica:{name}")
        for errand in [errand for errand in self.errands.values() if errand.target == name]:
            self.give(errand, self.live[0])
        if not zombie:
            del self.replicas[name]

    @rule(turns=st.lists(st.integers(0, 9), min_size=2, max_size=8))
    def replicas_work(self, turns: list[int]) -> None:
        """A step each, in this order; dead ones too, as long as they do not know."""
        for which in turns if self.replicas else ():
            self.work(list(self.replicas)[which % len(self.replicas)], 1)

    @rule(turns=st.lists(st.integers(0, 9), min_size=2, max_size=8))
    def replicas_work_on(self, turns: list[int]) -> None:
        """Most of the time is spent so."""
        self.replicas_work(turns)

    def work(self, name: str, count: int) -> None:
        """Read the inbox, then one step for everything that runs."""
        self.receive(name)
        running = self.replicas[name]
        for job_id, one in list(running.items()):
            self.write(running, job_id, one.output(count))

    def receive(self, name: str) -> None:
        running = self.replicas[name]
        reply: Any = self.blocking.xread({f"{self.settings.namespace}inbox:{name}": self.read[name]})
        for entry_id, fields in (entry for _, entries in reply for entry in entries):
            self.read[name] = entry_id
            inbound = decode_inbound(fields[b"w"])
            if isinstance(inbound.work, Abort):
                for job_id, one in list(running.items()):
                    if one.stream.request_id in inbound.work.ids:
                        self.write(running, job_id, Output(job_id, [], finish=Finish.ABORT))
                        running.pop(job_id, None)
            else:
                record = decode_record(bytes(inbound.work.record))
                stream = Stream(inbound.work, record, inbound.attempt, 16, inbound.fence)
                running[stream.job_id] = Running(stream, record)

    def write(self, running: dict[str, Running], job_id: str, output: Output) -> None:
        """I3: only the newest attempt is heard."""
        entry = running[job_id].stream.append(output)
        if entry is not None:
            newest = self.blocking.hget(f"{self.settings.namespace}req:{entry.id}", "attempt")
            (status,) = self.writer.append([entry])
            assert status is not AppendStatus.OK or int(newest) == entry.attempt  # type: ignore[arg-type]
            if status is not AppendStatus.OK or entry.final:
                running.pop(job_id)

    # -- what must hold

    def ended(self, id_: str) -> bool:
        return bool(self.blocking.hexists(f"{self.settings.namespace}req:{id_}", "done"))

    @invariant()
    def logs_hold_one_answer(self) -> None:
        """I2, I3: a prefix of the one answer there is, at most one end, nothing after it."""
        for id_, record in self.accepted.items():
            frames = self.run(self.log.read(id_))
            tokens = emitted_tokens(frames)
            assert tokens == expected_tokens(record.token_ids(), TOKENS)[: len(tokens)]
            ends = [frame for frame in frames if frame.finish is not None]
            assert ends == ([frames[-1]] if self.ended(id_) else [])

    def recover(self) -> None:
        """I1, I4: with one dispatcher and one replica alive everything accepted comes to its end, and the queue to
        rest."""
        self.replica_starts_anew()
        deadline = time.monotonic() + RECOVERY_S
        while not all(map(self.ended, self.accepted)) or self.run(self.depth()):
            assert time.monotonic() < deadline, [id_ for id_ in self.accepted if not self.ended(id_)]
            self.take(len(self.accepted), PULL_S[self.queue_settings.backend])
            for errand in list(self.errands.values()):
                self.give(errand, self.live[0])
            for name in self.replicas:
                self.work(name, TOKENS)
        self.logs_hold_one_answer()
        for id_ in self.accepted.keys() - self.disturbed:
            frames = self.run(self.log.read(id_))
            assert frames[-1].finish is Finish.LENGTH
            assert len(emitted_tokens(frames)) == TOKENS

    def replica_starts_anew(self) -> None:
        """All others are dead and gone."""
        for name in list(self.replicas):
            self.blocking.delete(f"{self.settings.namespace}replica:{name}")
        self.replicas.clear()
        self.live.clear()
        self.replica_starts()

    async def depth(self) -> int:
        return sum(of_class.requests for of_class in (await self.publisher.depth()).values())

    def teardown(self) -> None:
        try:
            self.recover()
        finally:
            self.run(self.consumer.close())
            self.run(self.publisher.close())
            self.run(self.client.aclose())
            self.writer.close()
            self.blocking.close()
            self.loop.close()


def live(queue: QueueSettings, url: str, examples: int, steps: int) -> None:
    budget = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=[Phase.reuse, Phase.generate],  # shrinking a life takes longer than reading it
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(partial(LifeMachine, queue, url), settings=budget)  # type: ignore[arg-type]


@pytest.mark.timeout(600)
def test_any_life_on_redis(redis_server: RedisServer) -> None:
    live(QueueSettings(), redis_server.url, examples=40, steps=40)


@pytest.mark.timeout(600)
def test_any_life_on_kafka(redis_server: RedisServer, kafka_broker: KafkaBroker) -> None:
    """Fewer lives: each has topics and consumers of its own to open and close."""
    queue = QueueSettings(backend="kafka", bootstrap=kafka_broker.bootstrap, partitions=2)
    live(queue, redis_server.url, examples=4, steps=20)
