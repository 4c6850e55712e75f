"""HTTP clients that read streams and resume them, wherever an ingress is left."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.support.simulated_stack import MODEL

READ_TIMEOUT_S = 60.0
"""Of silence on a stream: over the longest outage that a row makes."""
PATIENCE_S = 240.0
"""Until a client that finds no ingress gives up; another takes a minute or two to start."""
AGAIN_S = 0.2
"""Before the next ingress is tried."""
DONE = b"data: [DONE]"


def chat(prompt: str, tokens: int) -> dict[str, object]:
    """A streaming request that is answered by exactly so many tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


@dataclass
class Answer:
    """What one client was sent: whole event blocks, without comments."""

    body: dict[str, object]
    key: str = ""
    stream_id: str = ""
    blocks: list[bytes] = field(default_factory=list)
    resumed: int = 0
    last: float = 0.0
    gap_s: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return bool(self.blocks) and DONE in self.blocks[-1]

    @property
    def last_id(self) -> str:
        """Id of the last event that had one."""
        for block in reversed(self.blocks):
            for line in block.split(b"\n"):
                if line.startswith(b"id:"):
                    return line[3:].strip().decode()
        return ""

    @property
    def errors(self) -> list[bytes]:
        """Events that tell of an error."""
        return [block for block in self.blocks if b'data: {"error"' in block]

    @property
    def text(self) -> str:
        """What the answer says."""
        return "".join(_content(block) for block in self.blocks)


def _content(block: bytes) -> str:
    for line in block.split(b"\n"):
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or []
            return "".join(choice["delta"].get("content") or "" for choice in choices)
    return ""


class Clients:
    """Sends to any of the ingresses there are; ``urls`` is asked each time."""

    def __init__(self, urls: Callable[[], list[str]], rng: random.Random) -> None:
        self._urls = urls
        self._rng = rng
        self._http = httpx.AsyncClient(
            timeout=READ_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_connections=None)
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def read(self, answer: Answer, until: Callable[[Answer], bool] = lambda _: False) -> Answer:
        """Send and read to the end, resuming after every break; or until the client has had enough."""
        deadline = time.monotonic() + PATIENCE_S
        while not answer.done and not answer.errors and not until(answer):
            try:
                await self._connect(answer, until)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(AGAIN_S)
        return answer

    async def again(self, answer: Answer) -> Answer:
        """The same stream from its beginning."""
        return await self.read(Answer(answer.body, stream_id=answer.stream_id))

    async def _connect(self, answer: Answer, until: Callable[[Answer], bool]) -> None:
        url = self._rng.choice(self._urls() or ["http://127.0.0.1:9"])
        if answer.stream_id:
            headers = {"last-event-id": answer.last_id} if answer.last_id else {}
            sent = self._http.stream("GET", f"{url}/v1/streams/{answer.stream_id}", headers=headers)
            answer.resumed += bool(answer.blocks)
        else:
            headers = {"idempotency-key": answer.key} if answer.key else {}
            sent = self._http.stream("POST", f"{url}/v1/chat/completions", json=answer.body, headers=headers)
        async with sent as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                assert response.status_code >= 500, f"{response.status_code} {text}"  # else it will not get better
                raise httpx.ReadError(f"{response.status_code} {text}")
            answer.stream_id = response.headers["x-stream-id"]
            await _take(response, answer, until)


async def _take(response: httpx.Response, answer: Answer, until: Callable[[Answer], bool]) -> None:
    rest = b""
    async for chunk in response.aiter_raw():
        *whole, rest = (rest + chunk).split(b"\n\n")
        for block in whole:
            lines = [line for line in block.split(b"\n") if not line.startswith(b":")]
            answer.blocks.append(b"\n".join(lines))
        now = time.monotonic()
        answer.gap_s = max(answer.gap_s, now - answer.last) if answer.last else 0.0
        answer.last = now
        if until(answer):
            return
