"""Dispatch, append, append again, hand over, cancel, finish and die in any order: the log stays one exact answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from penstock.queue.local.redis_server import RedisServer
from penstock.queue.mailbox import TokenReader
from penstock.queue.messages import TERMINAL, Finish, Frame, Run, Stage, StreamError, encode, lua_string
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import Append, Dispatch, DispatchStatus, RequestLog, TokenWriter, emitted_tokens

pytestmark = pytest.mark.contract

REQUESTS = ["r0", "r1"]
REPLICAS = ["p", "q"]
READ_S = 20
ENDS = {
    Finish.ABORT: Frame(TERMINAL, [], finish=Finish.ABORT),
    Finish.ERROR: Frame(TERMINAL, [], finish=Finish.ERROR, error=StreamError("failed", "no")),
}


class Engine(NamedTuple):
    """One attempt at work, alive or a zombie: it goes on from ``emitted``."""

    request: str
    attempt: int
    emitted: list[int]
    sent: list[Append]


class Feed:
    """A mailbox that loses and repeats what Redis published, then reconnects."""

    channel = "ingress"

    def __init__(self, payloads: list[bytes]) -> None:
        self._payloads = payloads
        self._wakes: asyncio.Queue[bytes] = asyncio.Queue()

    async def messages(self) -> AsyncIterator[bytes | None]:
        for payload in [*self._payloads, None]:
            yield payload
        while True:
            yield await self._wakes.get()

    async def wake(self) -> None:
        self._wakes.put_nowait(b"")


class TokenLogMachine(RuleBasedStateMachine):
    """The model knows only what dispatch and append answered, and what a token must be: attempt and position."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.settings = RedisSettings(url=url, namespace=f"sm{uuid.uuid4().hex[:8]}:")
        self.loop = asyncio.new_event_loop()
        self.blocking = connect(self.settings)
        self.client = connect_async(self.settings)
        self.writer = TokenWriter(self.blocking, self.settings)
        self.log = RequestLog(self.client, self.settings)
        self.pubsub = self.blocking.pubsub()  # type: ignore[no-untyped-call]
        self.pubsub.subscribe(self.settings.namespace + Feed.channel)
        assert self.pubsub.get_message(timeout=5) is not None
        self.published: list[bytes] = []
        self.engines: list[Engine] = []
        self.model: dict[str, list[int]] = {request: [] for request in REQUESTS}
        self.valid: dict[str, int] = dict.fromkeys(REQUESTS, 0)
        self.deaths: dict[str, int] = dict.fromkeys(REQUESTS, 0)
        self.ended: dict[str, Finish] = {}
        self.cancelled: set[str] = set()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize()
    def replicas_start(self) -> None:
        for replica in REPLICAS:
            self.lives(replica)

    @rule(replica=st.sampled_from(REPLICAS))
    def lives(self, replica: str) -> None:
        self.blocking.set(f"{self.settings.namespace}replica:{replica}", b"1")

    @rule(replica=st.sampled_from(REPLICAS))
    def dies(self, replica: str) -> None:
        self.blocking.delete(f"{self.settings.namespace}replica:{replica}")

    @rule(
        request=st.sampled_from(REQUESTS),
        replica=st.sampled_from(REPLICAS),
        force=st.booleans(),
        informed=st.booleans(),
    )
    def dispatch(self, request: str, replica: str, force: bool, informed: bool) -> None:
        emitted = list(self.model[request]) if informed else []
        work = lua_string(encode(Run(request, Stage.WHOLE, msgspec.Raw(encode({})))))
        known = self.valid[request] if informed else 0
        deaths = self.deaths[request]
        one = Dispatch(request, len(emitted), Feed.channel, replica, work, "t", force, known, deaths, len(emitted) + 2)
        (answer,) = self.run(self.log.dispatch("d", [one]))
        assert (answer.status is DispatchStatus.DONE) == (request in self.ended)
        if answer.status is DispatchStatus.OK:
            assert request not in self.cancelled
            assert emitted == self.model[request]
            self.engines.append(Engine(request, answer.attempt, emitted, []))
        if answer.status in (DispatchStatus.OK, DispatchStatus.EMITTED):
            assert answer.attempt == self.valid[request] + 1
            assert answer.next == len(self.model[request])
            self.deaths[request] = answer.deaths
            self.valid[request] = answer.attempt

    @rule(
        which=st.integers(0, 100),
        count=st.integers(1, 3),
        finish=st.sampled_from([None, None, None, Finish.STOP]),
        hand_over=st.sampled_from([None, None, *REPLICAS]),
        skip=st.sampled_from([0, 0, 0, 0, 1]),
    )
    def append(self, which: int, count: int, finish: Finish | None, hand_over: str | None, skip: int) -> None:
        """The next tokens of any engine there ever was; with ``skip`` one that lost some."""
        if not self.engines:
            return
        engine = self.engines[which % len(self.engines)]
        index = len(engine.emitted) + skip
        tokens = [engine.attempt * 1000 + index + k for k in range(count)]
        frame = lua_string(encode(Frame(index, tokens, finish=finish)))
        step = Append(engine.request, engine.attempt, index, count, frame, finish is not None)
        if hand_over is not None:
            run = Run(engine.request, Stage.DECODE, msgspec.Raw(encode({})), engine.emitted + tokens)
            step = msgspec.structs.replace(step, hand_over=hand_over, work=lua_string(encode(run)))
        (status,) = self.writer.append([step])
        if engine.request in self.ended:
            assert status == "done"
        elif engine.attempt != self.valid[engine.request]:
            assert status == "stale"
        elif skip:
            assert status == "gap"
        else:
            assert status in ("ok", "lost") if hand_over else status == "ok"
            self.model[engine.request] += tokens
            engine.emitted.extend(tokens)
            engine.sent.append(step)
            if finish is not None:
                self.ended[engine.request] = finish

    @rule(which=st.integers(0, 100), back=st.integers(1, 3))
    def append_again(self, which: int, back: int) -> None:
        """The answer was lost: the same steps once more change nothing."""
        if self.engines and (sent := self.engines[which % len(self.engines)].sent):
            assert set(self.writer.append(sent[-back:])) <= {"ok", "stale", "done"}

    @rule(request=st.sampled_from(REQUESTS))
    def cancel(self, request: str) -> None:
        live = self.run(self.log.cancel([request]))
        assert live == (request not in self.ended)
        self.cancelled.add(request)

    @rule(request=st.sampled_from(REQUESTS), finish=st.sampled_from(sorted(ENDS)))
    def finish(self, request: str, finish: Finish) -> None:
        assert self.run(self.log.finish([(request, Feed.channel, ENDS[finish])])) == [request not in self.ended]
        self.ended.setdefault(request, finish)

    @invariant()
    def log_is_one_answer(self) -> None:
        for request, expected in self.model.items():
            self.check(request, expected, self.run(self.log.read(request)))

    def check(self, request: str, expected: list[int], frames: list[Frame]) -> None:
        """Every token once and in place, attempts in order, at most one end, and nothing after it."""
        tokens = emitted_tokens(frames)
        assert tokens == expected
        assert [token % 1000 for token in tokens] == list(range(len(tokens)))
        attempts = [token // 1000 for token in tokens]
        assert attempts == sorted(attempts)
        ends = [frame.finish for frame in frames if frame.finish is not None]
        assert ends == [self.ended[request]] if request in self.ended else not ends
        assert not ends or frames[-1].finish is not None

    @rule(losses=st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=60, max_size=60))
    def read(self, losses: list[int]) -> None:
        """A reader of a bad line (no, one or two copies of each message) that reconnects in the end sees the log."""
        while (message := self.pubsub.get_message(timeout=0.02)) is not None:
            self.published.append(message["data"])
        kept = [payload for payload, copies in zip(self.published, losses, strict=False) for _ in range(copies)]
        reader = TokenReader(Feed(kept), self.log)  # type: ignore[arg-type]
        for request in REQUESTS:
            reader.open(request)
        self.run(self.follow(reader))

    async def follow(self, reader: TokenReader) -> None:
        seen: dict[str, list[Frame]] = {request: [] for request in REQUESTS}
        total = sum([len(await self.log.read(request)) for request in REQUESTS])
        async with asyncio.timeout(READ_S), aclosing(reader.batches()) as batches:
            while sum(map(len, seen.values())) < total:
                for item in await anext(batches):
                    seen[item.id].append(item.frame)
        for request, expected in self.model.items():
            self.check(request, expected, seen[request])

    def teardown(self) -> None:
        self.pubsub.close()
        self.run(self.client.aclose())
        self.writer.close()
        self.blocking.close()
        self.loop.close()


@pytest.mark.timeout(300)
def test_any_order(redis_server: RedisServer) -> None:
    budget = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    machine = partial(TokenLogMachine, redis_server.url)
    run_state_machine_as_test(machine, settings=budget)  # type: ignore[arg-type] # any factory will do
