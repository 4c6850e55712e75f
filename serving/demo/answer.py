"""One streamed answer, as any client of the API gets it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
from rich.console import Console

CONNECT_TIMEOUT_S = 5.0
"""The server is on this machine and has said that it is ready."""
SILENCE_TIMEOUT_S = 60.0
"""Four keep-alives without one is a dead stream."""
MAX_TOKENS = 200


class AnswerFailed(Exception):
    """The server answered with an error; the message is the server's."""


class Answer(NamedTuple):
    """Seconds to the first token, and tokens per second after it."""

    ttft_s: float
    tokens: int
    tokens_per_s: float


def request_body(model: str, prompt: str) -> dict[str, Any]:
    """A streaming chat completion."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def curl_line(url: str, model: str, prompt: str) -> str:
    """A line for a shell."""
    body = json.dumps(request_body(model, prompt), ensure_ascii=False)
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python_snippet(url: str, model: str, prompt: str) -> str:
    """The same with the OpenAI client."""
    return f"""from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="not-needed")
stream = client.chat.completions.create(
    model={model!r},
    messages=[{{"role": "user", "content": {prompt!r}}}],
    max_tokens={MAX_TOKENS},
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()"""


async def stream_answer(url: str, model: str, prompt: str, console: Console) -> Answer:
    """Print an answer as its tokens come. Raises :class:`AnswerFailed` with the server's reason."""
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    body, started = request_body(model, prompt), time.monotonic()
    first = last = 0.0
    tokens = 0
    async with (
        httpx.AsyncClient(timeout=timeout, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise AnswerFailed(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
        async for event in _events(response):
            last = time.monotonic()
            if text := _text(event):
                first = first or last
                console.out(text, end="", highlight=False)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    console.out("")
    return Answer(first - started, tokens, (tokens - 1) / (last - first) if tokens > 1 else 0.0)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The stream's events: ``data:`` lines up to a blank line, comments skipped, until ``[DONE]``."""
    data: list[str] = []
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            payload = "\n".join(data)
            data.clear()
            if payload == "[DONE]":
                return
            yield _checked(json.loads(payload))
    raise AnswerFailed("the stream ended without [DONE]")


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise AnswerFailed(event["error"].get("message", "the stream failed"))
    return event


def _text(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
