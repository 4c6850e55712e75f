"""The two inner loops by themselves: Kafka's ledger, and the token log between a writer and a reader's decoder.

``python -m tests.benchmarks.micro``. Started by :class:`tests.benchmarks.rig.Client`; the Redis is the settings'.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import msgspec

from penstock.queue.ledger import Ledger
from penstock.queue.messages import Delivered, Finish, Frame, decode_delivered, encode, lua_string
from penstock.queue.records import new_request_id
from penstock.queue.redis_client import connect
from penstock.queue.settings import RedisSettings
from penstock.queue.token_log import Append, AppendStatus, TokenWriter
from tests.benchmarks.rig import serve_client

OFFSETS = 50_000
WINDOW = 512
"""Records on loan at once, finished in random order."""
COMMIT_EVERY = 128
STEPS = 300
BATCHES = (1, 32, 256)
"""Streams that share an engine step."""


def ledger() -> dict[str, float]:
    """Microseconds per offset, for all it goes through, and per commit."""
    ledger, rng, loan, commits = Ledger(0), random.Random(0), list[int](), 0.0
    started = time.perf_counter()
    for offset in range(OFFSETS):
        ledger.deliver(offset)
        loan.append(offset)
        if len(loan) == WINDOW:
            place = rng.randrange(WINDOW)
            loan[place], loan[-1] = loan[-1], loan[place]
            ledger.finish(loan.pop())
        if offset % COMMIT_EVERY == 0:
            before = time.perf_counter()
            ledger.metadata()
            commits += time.perf_counter() - before
    spent = time.perf_counter() - started - commits
    return {
        "ledger_us_per_offset": spent / OFFSETS * 1e6,
        "ledger_us_per_commit": commits / (OFFSETS / COMMIT_EVERY) * 1e6,
    }


def token_log() -> dict[str, float]:
    """Microseconds per token of an append, from its frames to Redis' answer, by streams in a step."""
    settings, found = RedisSettings(), {}
    with connect(settings) as client:
        writer = TokenWriter(client, settings)
        for batch in BATCHES:
            ids = [new_request_id() for _ in range(batch)]
            for id_ in ids:
                state = {"attempt": 1, "next": 0, "reply_to": "ingress:none"}
                client.hset(f"{settings.namespace}req:{id_}", mapping=state)
            spent = _timed(lambda ids=ids: _append_all(writer, ids))  # type: ignore[misc]
            found[f"append_us_per_token_{batch}_streams"] = spent / (STEPS * batch) * 1e6
        writer.close()
    return found


def _append_all(writer: TokenWriter, ids: list[str]) -> None:
    for step in range(STEPS):
        frame = Frame(step, [step], finish=Finish.LENGTH if step == STEPS - 1 else None)
        final = frame.finish is not None
        statuses = writer.append([Append(id_, 1, step, 1, lua_string(encode(frame)), final) for id_ in ids])
        assert set(statuses) == {AppendStatus.OK}, statuses


def decoding() -> dict[str, float]:
    """Microseconds per token to decode what a reader gets, 32 streams in a message."""
    message = msgspec.msgpack.encode([Delivered(new_request_id(), Frame(7, [7])) for _ in range(32)])
    spent = _timed(lambda: [decode_delivered(message) for _ in range(STEPS)])
    return {"decode_us_per_token": spent / (STEPS * 32) * 1e6}


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    serve_client(lambda: ledger() | token_log() | decoding())
