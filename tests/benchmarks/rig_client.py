"""``python -m tests.benchmarks.rig_client STREAMS REQUESTS TOKENS``: publish, and read every token, as an ingress does.

Started by :class:`tests.benchmarks.rig.Client`.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from penstock.queue.factory import open_queue
from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.records import PriorityClass, Record, new_request_id, now_ms, pack_tokens, prefix_hashes
from penstock.queue.redis_client import connect_async
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog
from tests.benchmarks.rig import serve_client

PROMPT_TOKENS = 64


def record(model: ModelSettings, reply_to: str, number: int, answer_tokens: int) -> Record:
    """A request whose prompt differs from every other's."""
    tokens = [(number * PROMPT_TOKENS + position) % 50_000 for position in range(PROMPT_TOKENS)]
    packed = pack_tokens(tokens)
    return Record(
        id=new_request_id(),
        model=model.served_name,
        pool=model.pool,
        release=model.release,
        tenant="bench",
        priority_class=PriorityClass.STANDARD,
        num_tokens=PROMPT_TOKENS,
        prompt=packed,
        sampling={"max_tokens": answer_tokens, "ignore_eos": True},
        reply_to=reply_to,
        accepted_ms=now_ms(),
        prefix_hashes=prefix_hashes(packed, "bench"),
    )


class Streams:
    """``streams`` requests open at any time, ``requests`` in all, with answers of ``tokens`` tokens."""

    def __init__(self, streams: int, requests: int, tokens: int) -> None:
        self._streams = streams
        self._tokens = tokens
        self._left = requests
        self._requests = requests
        redis, self._model = RedisSettings(), ModelSettings()
        self._client = connect_async(redis)
        self._queue = open_queue(QueueSettings(), redis, self._model.pool)
        mailbox = Mailbox(self._client, redis, f"ingress:{new_request_id()}")
        self._reader = TokenReader(mailbox, RequestLog(self._client, redis))
        self._publishing: set[asyncio.Task[None]] = set()

    async def run(self) -> dict[str, float]:
        """Tokens, seconds and this process' CPU seconds."""
        started, cpu = time.monotonic(), time.process_time()
        for _ in range(self._streams):
            self._next()
        tokens = ended = 0
        async for batch in self._reader.batches():
            for item in batch:
                tokens += len(item.frame.tokens)
                if item.frame.finish is not None:
                    self._reader.close(item.id)
                    ended += 1
                    self._next()
            if ended == self._requests:
                break
        seconds, spent = time.monotonic() - started, time.process_time() - cpu
        await self._queue.close()
        await self._client.aclose()
        assert tokens == self._requests * self._tokens, f"{tokens} tokens of {self._requests} requests"
        return {"tokens": tokens, "seconds": seconds, "cpu_s": spent}

    def _next(self) -> None:
        if self._left:
            self._left -= 1
            one = record(self._model, self._reader.channel, self._left, self._tokens)
            self._reader.open(one.id)
            task = asyncio.create_task(self._queue.publish(one))
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)


async def _measure(order: list[int]) -> dict[str, float]:
    return await Streams(*order).run()


if __name__ == "__main__":
    serve_client(lambda: uvloop.run(_measure([int(word) for word in sys.argv[1:]])))
