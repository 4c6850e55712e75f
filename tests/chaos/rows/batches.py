"""A batch while everything it runs on is killed: each line once in the output, and how often each was run."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from penstock.queue.errors import PenstockError
from penstock.queue.redis_client import connect
from penstock.serving.batches.client import BatchClient
from penstock.serving.batches.lines import LineSplitter
from tests.chaos.outcome import Scale, Size
from tests.chaos.round import Round
from tests.chaos.row import Row
from tests.chaos.rows.engines import PATIENT
from tests.chaos.rows.stores import append_only_file, bounce
from tests.support.simulated_stack import MODEL, Part, Shape
from tests.support.waiting import eventually_async

END_S = 3600.0
"""Two busy cores render a hundred lines a second, and an ingress takes a minute to start each time it was killed."""
SETTLED_S = 3.0
"""After this time a new batch is on Redis' disk."""
LOST_S = 1.0
LOOK_S = 5.0
"""Between two looks at what was run: a committed line's state is kept for a minute."""
ASK_S = 0.25
"""Between two looks at the batch, which cost an ingress a millisecond or two."""
MARGIN = 3
"""Faults hit the first two thirds, so that something is left to be done after the last."""
NAMES = ("output", "error")
SLOW = {"PENSTOCK_BATCHES_IN_FLIGHT": "64", "PENSTOCK_BATCHES_MAX_LINES": "1000000"}
ENDED = ("completed", "failed", "expired", "cancelled")


class Job:
    """One batch as its owner sees it, through whichever ingress answers, and its runs as Redis has them."""

    def __init__(self, round_: Round) -> None:
        self._stack = round_.stack
        self._tokens = round_.size.tokens
        self.lines = round_.size.requests
        self.id = ""
        self._answering = ""
        self.runs: dict[int, int] = {}

    def submit(self) -> None:
        """Upload and create."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "in.jsonl")
            path.write_bytes(b"".join(self._input()))
            with BatchClient(self._stack.urls[0], "") as api:
                file = api.upload(path)
                self.id = api.create(file["id"], "/v1/chat/completions", "24h", {})["id"]

    def seen(self) -> dict[str, Any]:
        """The batch's object; empty while no ingress answers."""
        for url in self._stack.urls:
            with suppress(PenstockError), BatchClient(url, "") as api:
                found, self._answering = api.batch(self.id), url
                return found
        return {}

    def finished(self) -> int:
        """Lines so far."""
        counts = self.seen().get("request_counts") or {}
        return int(counts.get("completed", 0)) + int(counts.get("failed", 0))

    def rows(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Everything in its files."""
        with BatchClient(self._answering, "") as api:
            for name in NAMES:
                splitter = LineSplitter(2**30)
                for piece in api.content(batch[f"{name}_file_id"]) if batch[f"{name}_file_id"] else ():
                    yield from (json.loads(line.data) for line in splitter.feed(piece) if line.data)

    def look(self) -> None:
        """Note how many replicas each line was given to so far, all its tries together."""
        settings, tries = self._stack.redis_settings, dict[str, int]()
        prefix = f"{settings.namespace}req:{self.id}-"
        with suppress(redis.RedisError), connect(settings) as client:
            keys = list(client.scan_iter(f"{prefix}*", count=1000))
            for start in range(0, len(keys), 1000):
                pipeline = client.pipeline(transaction=False)
                some = keys[start : start + 1000]
                for key in some:
                    pipeline.hget(key, "runs")
                tries |= {key.decode(): int(runs or 0) for key, runs in zip(some, pipeline.execute(), strict=True)}
        found: Counter[int] = Counter()
        for name, runs in tries.items():
            found[int(name.removeprefix(prefix).partition("-")[0])] += runs
        for line, runs in found.items():
            self.runs[line] = max(runs, self.runs.get(line, 0))

    def _input(self) -> Iterator[bytes]:
        for number in range(self.lines):
            messages = [{"role": "user", "content": f"Line {number}?"}]
            body = {"model": MODEL, "max_tokens": self._tokens, "ignore_eos": True, "messages": messages}
            line = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            yield json.dumps(line).encode() + b"\n"


async def batch_kill(round_: Round) -> None:
    """SIGKILL of whatever takes part, in a drawn order, after drawn numbers of lines."""
    job = Job(round_)
    await asyncio.to_thread(job.submit)
    await round_.sleep(SETTLED_S)
    looking = asyncio.create_task(_keep_looking(job))
    try:
        await _break(round_, job)
        await eventually_async(lambda: _ended(job), END_S, "the batch has ended")
    finally:
        looking.cancel()
        await asyncio.wait([looking])
    await asyncio.to_thread(job.look)
    await _judge(round_, job)


async def _break(round_: Round, job: Job) -> None:
    """Each kind of part in turn, in an order drawn for every turn."""
    faults, turn = round_.size.faults, list[Callable[[Round], Awaitable[None]]]()
    marks = sorted(round_.rng.sample(range(1, job.lines * (MARGIN - 1) // MARGIN), faults))
    for mark in marks:
        await eventually_async(lambda mark=mark: _reached(job, mark), END_S, f"{mark} lines are done")  # type: ignore[misc]
        turn = turn or round_.rng.sample(_kinds(round_), len(_kinds(round_)))
        await turn.pop()(round_)


def _kinds(round_: Round) -> list[Callable[[Round], Awaitable[None]]]:
    kinds = [_kill_engine, _kill_dispatcher, _kill_coordinator, _kill_redis, _cut_redis]
    return kinds + ([_kill_broker] if round_.stack.kafka is not None else [])


async def _kill_engine(round_: Round) -> None:
    await _replace(round_, round_.rng.choice(round_.stack.of_kind("mixed")))


async def _kill_dispatcher(round_: Round) -> None:
    await _replace(round_, round_.rng.choice(round_.stack.of_kind("dispatcher")))


async def _kill_coordinator(round_: Round) -> None:
    """The ingress that has the batch, once there is another to take over."""
    stack = round_.stack
    await asyncio.to_thread(stack.await_ready, stack.of_kind("ingress"))
    await _replace(round_, max(stack.of_kind("ingress"), key=_taken_at))


async def _kill_redis(round_: Round) -> None:
    await round_.inject("kill -9 of Redis", bounce, round_.stack.redis)
    round_.figure("Redis killed", 1)


async def _cut_redis(round_: Round) -> None:
    """What a host finds that lost power: nothing of the last second."""
    file = append_only_file(round_.stack.redis.folder)
    size = file.stat().st_size
    await round_.sleep(LOST_S)

    def cut(found: Path) -> None:
        if found == file:  # else Redis has just begun another one, which is flushed
            os.truncate(file, size)

    await round_.inject("Redis loses its last second", bounce, round_.stack.redis, cut)
    round_.figure("Redis cut", 1)


async def _kill_broker(round_: Round) -> None:
    assert round_.stack.kafka is not None
    await round_.inject("kill -9 of the broker", bounce, round_.stack.kafka)
    round_.figure("broker killed", 1)


async def _replace(round_: Round, part: Part) -> None:
    await round_.inject(f"kill -9 {part.name}", round_.stack.kill, part)
    round_.figure(f"{part.kind} killed", 1)
    await asyncio.to_thread(round_.stack.add, part.kind)


def _taken_at(part: Part) -> str:
    taken = [line for line in part.log.read_text(errors="replace").splitlines() if '"batch_taken"' in line]
    return str(json.loads(taken[-1])["timestamp"]) if taken else ""


async def _reached(job: Job, mark: int) -> bool:
    await asyncio.sleep(ASK_S)
    return await asyncio.to_thread(job.finished) >= mark


async def _ended(job: Job) -> bool:
    await asyncio.sleep(ASK_S)
    return (await asyncio.to_thread(job.seen)).get("status") in ENDED


async def _keep_looking(job: Job) -> None:
    while True:
        await asyncio.to_thread(job.look)
        await asyncio.sleep(LOOK_S)


async def _judge(round_: Round, job: Job) -> None:
    outcome = round_.outcome
    batch = await asyncio.to_thread(job.seen)
    rows = await asyncio.to_thread(lambda: list(job.rows(batch)))
    ids = Counter(row["custom_id"] for row in rows)
    missing = job.lines - len(ids)
    twice = [name for name, count in ids.items() if count > 1]
    whole = [row for row in rows if _tokens(row) == round_.size.tokens]
    outcome.requests, outcome.finished = job.lines, len(whole)
    runs = Counter(job.runs.values())
    for number, count in sorted(runs.items()):
        round_.figure(f"lines run {number} times", count)
    outcome.reexecuted = sum(count for number, count in runs.items() if number > 1) / job.lines
    outcome.check("", "the batch completed", batch["status"] == "completed", batch)
    outcome.check("I1", "no line is missing", not missing, missing)
    outcome.check("I2", "no line is there twice", not twice, twice[:5])
    outcome.check("I2, I5", "every line has its whole answer", len(whole) == job.lines, job.lines - len(whole))
    counts = {"total": job.lines, "completed": job.lines, "failed": 0}
    outcome.check("", "the counts are right", batch["request_counts"] == counts, batch["request_counts"])
    await round_.settle()


def _tokens(row: dict[str, Any]) -> int:
    response = row["response"] or {}
    return int(((response.get("body") or {}).get("usage") or {}).get("completion_tokens", 0))


def _sizes(test: int) -> dict[Scale, Size]:
    return {
        Scale.TEST: Size(test, 64, 8, requests=400),
        Scale.SHORT: Size(6, 64, 16, requests=3_000),
        Scale.LONG: Size(24, 64, 16, requests=50_000),
    }


ROWS = [
    Row(
        f"batch-kill-{queue}",
        f"everything under a batch is killed: {queue}",
        Shape(prefill=0, decode=0, mixed=2, ingresses=2, queue=queue, settings=PATIENT | SLOW),
        _sizes(faults),
        batch_kill,
    )
    for queue, faults in (("redis", 5), ("kafka", 6))
]
