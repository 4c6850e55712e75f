"""The decode engine dies in the middle of every kind of answer at once. Each must come out as if nothing had happened:
text on both sides of the seam, stop strings, calls and reasoning that vLLM's parsers find, log probabilities, usage."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from penstock.queue.local.process import free_port
from tests.stack.conftest import MODEL, RunningStack, extra_ingress
from tests.stack.merged import JSON, events_of, merged
from tests.stack.test_life import decode_replica
from tests.support.waiting import eventually

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

BEGUN = 8
"""Events of a stream before the engine is killed: well past the first token, far from the last."""
ROUNDS = 3
ANSWER_TIMEOUT_S = 300.0
"""For an answer, with the start of a new engine in it, on a busy machine."""
STEPS = "[1-9](, [1-9]){50}"
DIGITS = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "minItems": 50, "maxItems": 60}
PARAMETERS = {"type": "object", "properties": {"steps": DIGITS}, "required": ["steps"], "additionalProperties": False}
SCALE = {"type": "function", "function": {"name": "scale", "parameters": PARAMETERS, "strict": True}}


def _chat(content: str, **fields: Any) -> tuple[str, JSON]:
    usage = {"stream_options": {"include_usage": True}}
    return "chat/completions", {"messages": [{"role": "user", "content": content}]} | usage | fields


def _matching(regex: str, **fields: Any) -> tuple[str, JSON]:
    return _chat("Say it.", structured_outputs={"regex": regex}, **fields)


KINDS = {
    "greedy": _chat("Count to 90."),
    "stop string": _chat("Count to 90.", stop=["78 79"]),
    "log probabilities": _chat("Count to 80.", logprobs=True, top_logprobs=2),
    "seed, two choices": _chat("Tell me more.", temperature=1.0, seed=11, n=2, max_tokens=150, ignore_eos=True),
    "penalties": _chat("Count to 90.", frequency_penalty=0.2, min_tokens=150, max_tokens=150),
    "auto call": _matching(
        r'<tool_call>\n\{"name": "scale", "arguments": \{"steps": \[' + STEPS + r"\]\}\}\n</tool_call>", tools=[SCALE]
    ),
    "named call": _chat(
        "Say it.", tools=[SCALE], tool_choice={"type": "function", "function": {"name": "scale"}}, max_tokens=150
    ),
    "reasoning": _matching("Here is my thought process: [a-z ]{90,100} Here is my response: [a-z ]{90,100}"),
    "completion": ("completions", {"prompt": "1 2 3 4", "max_tokens": 200, "ignore_eos": True, "echo": True}),
    "response": ("responses", {"input": "Count to 90."}),
    "message": ("messages", {"messages": [{"role": "user", "content": "Count to 90."}], "max_tokens": 400}),
}


@pytest.fixture(scope="module")
def parsing(stack: RunningStack) -> Iterator[str]:
    """An ingress with a reasoning parser, which finds its marks in the text: the demo model has no tokens for them. In
    vLLM it hides calls from their parser, so the others go elsewhere."""
    with extra_ingress(stack, free_port(), PENSTOCK_INGRESS_REASONING_PARSER="granite") as url:
        yield url


class Stream:
    """One kind of answer, read in a thread of its own."""

    def __init__(self, base: str, kind: str) -> None:
        path, fields = KINDS[kind]
        self.kind = kind
        self.seen = 0
        self.ended = threading.Event()
        self._url = f"{base}/v1/{path}"
        self._body = {"model": MODEL, "stream": True, "temperature": 0} | fields

    def read(self) -> JSON:
        """The whole answer."""
        lines = []
        with httpx.stream("POST", self._url, json=self._body, timeout=ANSWER_TIMEOUT_S, trust_env=False) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                lines.append(line)
                self.seen += line.startswith("data: {")
        self.ended.set()
        return merged(events_of(lines))


def _all_at_once(bases: dict[str, str], victim: int) -> tuple[dict[str, JSON], list[str]]:
    """Every answer, and which of them the death of ``victim`` (0: of nobody) has hit in their middle."""
    streams = [Stream(bases[kind], kind) for kind in KINDS]
    hit: list[str] = []
    with ThreadPoolExecutor(len(streams)) as threads:
        futures = {stream.kind: threads.submit(stream.read) for stream in streams}
        if victim:
            eventually(
                lambda: all(stream.seen >= BEGUN or stream.ended.is_set() for stream in streams),
                ANSWER_TIMEOUT_S, "every answer has begun", poll_s=0.001,
            )  # fmt: skip
            os.kill(victim, signal.SIGKILL)
            hit = [stream.kind for stream in streams if not stream.ended.is_set()]
    return {kind: future.result() for kind, future in futures.items()}, hit


def test_every_kind_of_answer_crosses_the_death_of_its_engine(stack: RunningStack, parsing: str) -> None:
    """[I2, I3] Killed again and again until each has been hit."""
    bases = dict.fromkeys(KINDS, stack.urls["redis"]) | {"reasoning": parsing}
    undisturbed, _ = _all_at_once(bases, 0)
    _assert_of_their_kind(undisturbed)
    missed = set(KINDS)
    for _ in range(ROUNDS):
        victim = decode_replica(stack)
        answers, hit = _all_at_once(bases, victim.pid)
        for kind, answer in answers.items():
            assert answer == undisturbed[kind], kind
        missed -= set(hit)
        if not missed:
            return
    pytest.fail(f"never hit in the middle: {missed}")


def _assert_of_their_kind(answers: dict[str, JSON]) -> None:
    first = {kind: answer["choices"][0] for kind, answer in answers.items()}
    assert first["stop string"]["text"].endswith("77 ")
    assert first["stop string"]["stop_reason"] == "78 79"
    assert len(first["log probabilities"]["logprobs"]) > 80
    assert len(answers["seed, two choices"]["choices"]) == 2
    assert first["auto call"]["call 0"].startswith("scale{")
    assert first["auto call"]["finish_reason"] == "tool_calls"
    assert first["named call"]["call 0"].startswith("scale{")
    assert len(first["reasoning"]["reasoning"]) >= 90 <= len(first["reasoning"]["text"])
    for kind in ("greedy", "response", "message"):
        assert "87 88 89 90" in first[kind]["text"]
    assert all(answer["usage"] for kind, answer in answers.items() if kind != "completion")
