"""Clients that leave, and ingresses that die under theirs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import redis.asyncio

from penstock.queue.redis_client import connect_async
from tests.chaos.http_clients import Answer, Clients, chat
from tests.chaos.load import PROGRESS_S, Load, Stream, quantile
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round
from tests.chaos.row import Row
from tests.chaos.rows.engines import PATIENT, SPLIT
from tests.chaos.rows.stores import trouble
from tests.support.simulated_stack import Shape
from tests.support.waiting import eventually_async

ABORTED_S = 2.0
"""From a client's departure until its engine has dropped it, at p99."""
KV_BACK_S = 5.0
"""From the last departure until no KV cache is in use."""
GROWN_BYTES = 64 * 1024 * 1024
"""How much an ingress may grow while its readers or Redis are in trouble."""
EDGE = Shape(prefill=0, decode=0, mixed=2, ingresses=2, settings=PATIENT)


async def disconnects(round_: Round) -> None:
    """Every other request is cancelled somewhere in its answer, and dropped everywhere, soon."""
    took: list[float] = []
    left: set[str] = set()
    async with round_.load() as load:
        await asyncio.gather(*(_visitor(round_, load, left, took) for _ in range(round_.size.streams)))
        back = await round_.soon(round_.kv_free, KV_BACK_S)
        await round_.conclude(load, doomed=left)
        round_.outcome.finished += load.tally.errors["aborted"]  # the proper end of what nobody waits for
    _aborted(round_, took, back)


def _aborted(round_: Round, took: list[float], back: bool) -> None:
    p99 = quantile(took, 0.99)
    round_.figure("abort p99 s", p99)
    round_.timing("I6", f"aborted within {ABORTED_S} s at p99", p99 <= ABORTED_S, p99)
    round_.timing("I6", f"KV back within {KV_BACK_S} s", back, "not back")


async def _visitor(round_: Round, load: Load, left: set[str], took: list[float]) -> None:
    while round_.outcome.injected < round_.size.faults:
        round_.outcome.injected += 1
        stays, goes = await load.send(), await load.send()
        left.add(goes.record.id)
        await _leaves(load, goes, round_.rng.randrange(round_.size.tokens // 2), took)
        await stays.ended.wait()
        load.leave(stays)


async def _leaves(load: Load, stream: Stream, after: int, took: list[float]) -> None:
    await load.reached(stream, after)
    left = time.monotonic()
    if await load.log.cancel([stream.record.id]):
        await stream.ended.wait()
        took.append(time.monotonic() - left)
    load.leave(stream)


async def hang_ups(round_: Round) -> None:
    """The same over HTTP: every other client closes its connection in mid-answer."""
    took: list[float] = []
    clients = Clients(lambda: round_.stack.urls, round_.rng)
    try:
        async with connect_async(round_.stack.redis_settings) as client:
            await asyncio.gather(*(_caller(round_, clients, client, took) for _ in range(round_.size.streams)))
        back = await round_.soon(round_.kv_free, KV_BACK_S)
    finally:
        await clients.close()
    round_.outcome.check("I5", "every request ended", round_.outcome.finished == round_.outcome.requests)
    await round_.settle()
    _aborted(round_, took, back)


async def _caller(round_: Round, clients: Clients, client: redis.asyncio.Redis, took: list[float]) -> None:
    outcome = round_.outcome
    while outcome.injected < round_.size.faults:
        outcome.injected += 1
        number, events = outcome.injected, round_.rng.randrange(2, round_.size.tokens // 2)
        stays = asyncio.create_task(clients.read(Answer(chat(f"stay {number}", round_.size.tokens))))
        goes = Answer(chat(f"go {number}", round_.size.tokens))
        await clients.read(goes, lambda answer, events=events: len(answer.blocks) >= events)  # type: ignore[misc]
        left = time.monotonic()
        key = f"{round_.stack.redis_settings.namespace}req:{goes.stream_id}"
        await eventually_async(lambda key=key: client.hexists(key, "done"), PROGRESS_S, f"{key} is done")  # type: ignore[misc]
        took.append(time.monotonic() - left)
        whole = await stays
        outcome.requests += 2
        outcome.finished += 1 + whole.done


async def ingress_kill(round_: Round) -> None:
    """Kill ingresses; every client resumes at whichever is left and reads the very bytes it would have read."""

    async def faults(answers: list[Answer]) -> None:
        stack = round_.stack
        for _ in range(round_.size.faults):
            await asyncio.to_thread(stack.await_ready, stack.of_kind("ingress"))
            await _progress(round_, answers)
            victim = round_.rng.choice(stack.of_kind("ingress"))
            await round_.inject(f"kill -9 {victim.name}", stack.kill, victim)
            await asyncio.to_thread(stack.add, "ingress")

    await _same_bytes(round_, faults)


async def redis_under_clients(round_: Round) -> None:
    """Kill, stall and fill Redis under HTTP streams: they end unaltered, and ingresses keep nothing in memory."""
    before = round_.memory("ingress")

    async def faults(answers: list[Answer]) -> None:
        for turn in range(round_.size.faults):
            await _progress(round_, answers)
            await trouble(round_, turn)

    await _same_bytes(round_, faults)
    grown = max(now - before.get(name, now) for name, now in round_.memory("ingress").items())
    round_.figure("ingress grew MB", grown / 2**20)
    round_.outcome.check("", "an ingress grows less than 64 MB", grown < GROWN_BYTES, grown)


async def rolling(round_: Round) -> None:
    """Replace every process by a successor, ingresses too: no stream breaks, so no client has to come back."""

    async def faults(answers: list[Answer]) -> None:
        for _ in range(round_.size.faults):
            for part in list(round_.stack.parts.values()):
                await _progress(round_, answers)
                await round_.inject(f"replace {part.name}", round_.stack.replace, part)

    answers = await _same_bytes(round_, faults)
    broken = [answer.stream_id for answer in answers if answer.resumed]
    round_.outcome.check("I1", "no stream broke", not broken, broken[:3])


async def _same_bytes(round_: Round, faults: Callable[[list[Answer]], Awaitable[None]]) -> list[Answer]:
    """Clients read the same answers calmly, then under faults, resuming; then what they read is read again whole.
    Returns what they read under faults."""
    clients = Clients(lambda: round_.stack.urls, round_.rng)
    bodies = [chat(f"Tell me about {number}.", round_.size.tokens) for number in range(round_.size.streams)]
    try:
        calm = await asyncio.gather(*(clients.read(Answer(body)) for body in bodies))
        answers = await _disturbed(round_, clients, bodies, faults)
        whole = await _read_again(clients, answers, len(bodies))
    finally:
        await clients.close()
    outcome, texts = round_.outcome, {id(answer.body): answer.text for answer in calm}
    outcome.requests, outcome.finished = len(answers), sum(answer.done for answer in answers)
    outcome.gap_p95_s = quantile([answer.gap_s for answer in answers if answer.resumed], 0.95)
    other = [a.stream_id for a, b in zip(answers, whole, strict=True) if a.blocks != b.blocks]
    changed = [answer.stream_id for answer in answers if answer.text != texts[id(answer.body)]]
    failed = [block for answer in answers for block in answer.errors]
    outcome.altered = len(changed)
    outcome.check("I1, I5", "every stream came to its end", outcome.finished == outcome.requests, failed[:3])
    outcome.check("I2", "the text is that of the undisturbed run", not changed, changed[:3])
    outcome.check("I4", "the bytes are those of the stream read whole", not other, other[:3])
    round_.figure("resumed", sum(answer.resumed for answer in answers))
    await round_.settle()
    return answers


async def _read_again(clients: Clients, answers: list[Answer], at_once: int) -> list[Answer]:
    """Each from its beginning. No more side by side than were read before: a long round has thousands."""
    turns = asyncio.Semaphore(at_once)

    async def again(answer: Answer) -> Answer:
        async with turns:
            return await clients.again(answer)

    return await asyncio.gather(*(again(answer) for answer in answers))


async def _disturbed(
    round_: Round,
    clients: Clients,
    bodies: list[dict[str, object]],
    faults: Callable[[list[Answer]], Awaitable[None]],
) -> list[Answer]:
    """Clients go on until the last fault; half of them have an idempotency key."""
    answers: list[Answer] = []
    over = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not over.is_set():
            key = f"{round_.outcome.row}-{round_.outcome.seed}-{number}-{turn}" if number % 2 else ""
            answer = Answer(bodies[number], key)
            answers.append(answer)
            await clients.read(answer)
            turn += 1

    running = asyncio.gather(*(client(number) for number in range(len(bodies))))
    await faults(answers)
    over.set()
    await running
    return answers


async def _progress(round_: Round, answers: list[Answer]) -> None:
    goal = _blocks(answers) + round_.rng.randint(1, round_.size.streams * round_.size.tokens // 2)

    async def reached() -> bool:
        return _blocks(answers) >= goal

    await eventually_async(reached, PROGRESS_S, f"{goal} events")


def _blocks(answers: list[Answer]) -> int:
    return sum(len(answer.blocks) for answer in answers)


ROWS = [
    Row(
        "disconnects",
        "requests are cancelled in mid-answer",
        SPLIT,
        {Scale.TEST: Size(48, 12, 128), Scale.SHORT: Size(300, 32, 256), Scale.LONG: Size(1_000, 32, 256)},
        disconnects,
    ),
]
EDGE_ROWS = [
    Row(
        "hang-ups",
        "clients hang up in mid-answer",
        EDGE,
        {Scale.TEST: Size(12, 4, 128), Scale.SHORT: Size(200, 16, 256), Scale.LONG: Size(1_000, 16, 256)},
        hang_ups,
    ),
    Row(
        "ingress-kill",
        "ingress kill -9, clients resume",
        EDGE,
        {Scale.TEST: Size(1, 12, 384), Scale.SHORT: Size(3, 24, 512), Scale.LONG: Size(20, 64, 512)},
        ingress_kill,
    ),
    Row(
        "redis-under-clients",
        "Redis kill, stall and full under HTTP streams",
        EDGE,
        {
            Scale.TEST: Size(3, 12, 256, seconds=2),
            Scale.SHORT: Size(3, 64, 512, seconds=5),
            Scale.LONG: Size(12, 64, 512, seconds=5),
        },
        redis_under_clients,
    ),
    Row(
        "rolling-under-clients",
        "rolling replacement of everything, ingresses too, under HTTP streams",
        EDGE,
        {Scale.TEST: Size(1, 12, 384), Scale.SHORT: Size(1, 12, 384), Scale.LONG: Size(3, 32, 384)},
        rolling,
    ),
]
