"""One row being played: its stack, its seeded dice, the loads that run and what was found."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from penstock.queue.factory import open_queue
from penstock.queue.protocol import RequestQueue
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import emitted_tokens
from tests.chaos.load import Audit, Load, Oracle, quantile, simulated
from tests.chaos.outcome import Outcome, Scale, Size
from tests.support.simulated_stack import POOL, Part, SimulatedStack
from tests.support.waiting import eventually_async

VOCABULARY = range(1024, 2900)
"""Token ids prompts are drawn from: ordinary tokens of every usual vocabulary, and of the demo model's small one."""
PROMPT_TOKENS = 80
"""Enough to go through the prefill pool."""
DRAIN_S = 90.0
"""After the last fault everything must have ended within this time; a stream that has not is lost."""
BUSY_S = 5.0
"""For a heartbeat to tell that an engine runs something; prefill replicas mostly do not."""
LEARN_S = 300.0
"""A handful of answers of real engines, on two cores."""
KV_LEAK_S = 40.0
"""KV that nobody fetched is kept for its lease of 30 s; after this time none may be in use."""

Sampling = Callable[[int], dict[str, Any]]


def greedy(tokens: int) -> Sampling:
    """Plain sampling, which another engine can continue."""
    return lambda _: {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}


def mixed_sampling(tokens: int) -> Sampling:
    """Every fourth request has a seed, so that it must be replayed instead of continued."""
    plain = greedy(tokens)
    return lambda number: plain(number) | ({"seed": number} if number % 4 == 3 else {})


class Round:
    """What a row's ``play`` gets."""

    def __init__(self, stack: SimulatedStack, size: Size, outcome: Outcome, say: Callable[[str], None]) -> None:
        self.stack = stack
        self.size = size
        self.outcome = outcome
        self.rng = random.Random(f"{outcome.seed}:{outcome.row}")
        self.restarts = False
        """Whether the row itself starts again what has died."""
        self._say = say
        self._learnt: list[list[int]] = []
        self._oracle: Oracle = simulated

    # -- load

    @contextlib.asynccontextmanager
    async def load(
        self,
        *,
        sampling: Sampling | None = None,
        prompt: Callable[[int], list[int]] | None = None,
        streams: int = 0,
        redis: RedisSettings | None = None,
    ) -> AsyncIterator[Load]:
        """A load on this stack, by default of plain requests with short prompts."""
        async with Load(
            self.stack.queue_settings,
            redis or self.stack.redis_settings,
            concurrency=streams or self.size.streams,
            prompt=prompt or self.prompt(PROMPT_TOKENS),
            sampling=sampling or greedy(self.size.tokens),
            oracle=self._oracle,
        ) as load:
            yield load

    def prompt(self, tokens: int) -> Callable[[int], list[int]]:
        """Prompts by number: fresh ones of so many tokens, or those whose answer was learnt."""
        if self._learnt:
            return lambda number: self._learnt[number % len(self._learnt)]
        return lambda _: self.rng.choices(VOCABULARY, k=tokens)

    async def steady(self, load: Load, faults: Callable[[Load], Any]) -> None:
        """Keep the load on while ``faults`` are injected, then wait until every request has ended."""
        running = asyncio.create_task(load.run(self.size.requests))
        try:
            await self._whichever(running, faults(load))
            load.stop()
            await self.soon(lambda: self._over(running, load), DRAIN_S)  # what is still open then counts as lost
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _over(self, running: asyncio.Task[None], load: Load) -> bool:
        if not self.restarts:
            self.stack.assert_alive()
        return running.done() and all(stream.ended.is_set() for stream in load.open.values())

    @staticmethod
    async def _whichever(running: asyncio.Task[None], faults: Any) -> None:
        """To the end of the faults; a load that failed ends the row at once."""
        injecting = asyncio.ensure_future(faults)
        done, _ = await asyncio.wait({running, injecting}, return_when=asyncio.FIRST_COMPLETED)
        if running in done and running.exception() is not None:
            injecting.cancel()
        await asyncio.gather(*done)
        await injecting

    # -- faults

    async def inject(self, what: str, action: Callable[..., Any], *args: Any) -> Any:
        """Do it, in a thread, and count it."""
        self.outcome.injected += 1
        self._say(f"{what} ({self.outcome.injected})")
        return await asyncio.to_thread(action, *args)

    async def leased(self, *kinds: str) -> list[Part]:
        """Engines of these kinds that others see alive."""
        pids = (await asyncio.to_thread(self.stack.replicas)).keys()
        return [part for part in self.stack.of_kind(*kinds) if part.pid in pids]

    async def sleep(self, seconds: float) -> None:
        """How long a fault lasts: part of what it is."""
        await asyncio.sleep(seconds)

    async def enough(self, kind: str, count: int) -> list[Part]:
        """Wait until so many engines of a kind are alive."""

        async def there() -> bool:
            self.stack.assert_alive()
            return len(await self.leased(kind)) >= count

        limit = max(DRAIN_S, self.stack.engine_start_s)
        await eventually_async(there, limit, f"{count} {kind} replicas are alive")
        return await self.leased(kind)

    async def busy(self, kind: str) -> list[Part]:
        """Engines of a kind that run something; waits for one, unless nothing is left to run."""
        found: list[Part] = []

        async def there() -> bool:
            nonlocal found
            replicas = await asyncio.to_thread(self.stack.replicas)
            found = [part for part in self.stack.of_kind(kind) if part.pid in replicas and replicas[part.pid].running]
            return bool(found)

        return found if await self.soon(there, BUSY_S) else await self.leased(kind)

    async def kill_engine(self, kind: str, keep: int = 1) -> None:
        """SIGKILL one that works, when a standby is there, and start its successor."""
        await self.enough(kind, keep + 1)
        victim = self.rng.choice(await self.busy(kind))
        await self.inject(f"kill -9 {victim.name}", self.stack.kill, victim)
        await asyncio.to_thread(self.stack.add, kind)

    # -- findings

    def figure(self, name: str, value: float) -> None:
        """A number of this row's own; several are added up."""
        self.outcome.figures[name] = self.outcome.figures.get(name, 0.0) + value

    def timing(self, invariant: str, what: str, holds: bool, found: object) -> None:
        """A limit in seconds: judged in the rounds that have the machine to themselves."""
        if self.outcome.scale is not Scale.TEST:
            self.outcome.check(invariant, what, holds, found)

    async def conclude(
        self, load: Load, *, exact_logs: bool = True, kv: bool = False, doomed: Collection[str] = ()
    ) -> Audit:
        """The checks every row makes: all that was accepted ended, exactly, and nothing is held any more. What is
        ``doomed`` had to fail."""
        outcome, tally = self.outcome, load.tally
        audit = await load.audit()
        self.enter(load, audit)
        wrong_end = [id_ for id_, stream in load.streams.items() if stream.finish is None or stream.error]
        unfinished = [f"{id_} {load.streams[id_].error or 'open'}" for id_ in wrong_end if id_ not in doomed]
        found = f"{len(unfinished)}, such as {unfinished[:3]}; logs in {self.stack.folder}"
        outcome.check("I1, I5", "every accepted request finished", not unfinished, found)
        wrong = {"lost": tally.lost, "repeated": tally.repeated, "altered": tally.altered}
        outcome.check("I2, I4", "no token lost, repeated or altered", not any(wrong.values()), wrong)
        if exact_logs:
            outcome.check("I2, I3", "each log holds one answer and one end", not audit.wrong, audit.wrong[:5])
        await self.settle(kv=kv)
        return audit

    async def settle(self, *, kv: bool = False) -> None:
        """The checks of what is left behind."""
        died = [str(part.log) for part in self.stack.dead_parts()]
        self.outcome.check("", "no process ended by itself", not died, died)
        queue = open_queue(self.stack.queue_settings, self.stack.redis_settings, POOL)
        try:
            self.outcome.check("I1", "the queue is empty", await self.soon(lambda: self._empty(queue), DRAIN_S))
        finally:
            await queue.close()
        if kv or self.outcome.scale is not Scale.TEST:  # it takes as long as an unread KV cache is kept
            free = await self.soon(self.kv_free, KV_LEAK_S + self.stack.engine_start_s)
            self.outcome.check("I6", f"no KV block in use {KV_LEAK_S:.0f} s later", free, await self._kv())

    def hit(self, audit: Audit) -> None:
        """Faults that met nobody at work show nothing."""
        self.outcome.check("", "the faults met running requests", audit.reexecuted > 0, "none was run again")

    def enter(self, load: Load, audit: Audit) -> None:
        """Add a load's figures to the row."""
        outcome, tally = self.outcome, load.tally
        hit = [stream for id_, stream in load.streams.items() if audit.runs.get(id_, 0) > 1]
        outcome.requests += tally.accepted
        outcome.finished += tally.finished
        outcome.lost += tally.lost
        outcome.repeated += tally.repeated
        outcome.altered += tally.altered
        outcome.errors = dict(tally.errors)
        outcome.reexecuted = audit.reexecuted
        outcome.gap_p95_s = quantile([stream.gap_s for stream in hit or load.streams.values()], 0.95)

    async def _kv(self) -> dict[str, int]:
        """Tokens in use, by engine; nothing of one that has no lease."""
        replicas = await asyncio.to_thread(self.stack.replicas)
        return {part.name: replicas[part.pid].kv_used for part in self.stack.engines if part.pid in replicas}

    def memory(self, kind: str) -> dict[str, int]:
        """Resident bytes of the parts of a kind, by name."""
        return {part.name: self.stack.rss_bytes(part) for part in self.stack.of_kind(kind)}

    async def kv_free(self) -> bool:
        """Whether every engine says that none of its KV cache is in use."""
        used = await self._kv()
        return len(used) == len(self.stack.engines) and not any(used.values())

    @staticmethod
    async def _empty(queue: RequestQueue) -> bool:
        return not any(of_class.requests for of_class in (await queue.depth()).values())

    @staticmethod
    async def soon(condition: Callable[[], Any], within_s: float) -> bool:
        try:
            await eventually_async(condition, within_s, "it holds")
        except AssertionError:
            return False
        return True

    # -- a real engine's answers

    async def learn(self, prompts: int) -> None:
        """Run a few prompts undisturbed and take what a real engine answers as the truth."""
        self._learnt = [self.prompt(PROMPT_TOKENS)(number) for number in range(prompts)]
        self._oracle = lambda record: []
        async with self.load(streams=4) as load:
            running = asyncio.create_task(load.run(prompts))
            await eventually_async(lambda: self._over(running, load), LEARN_S, "the undisturbed run is over")
            answers = {
                stream.record.prompt: emitted_tokens(await load.log.read(id_)) for id_, stream in load.streams.items()
            }
        self._oracle = lambda record: answers[record.prompt][: record.max_tokens]
