"""An answer is a function of the stored request and the token log: wherever and from whatever event on, it is the same.

Here the request is stored and the log written by the test, so that the model says what is to be rendered.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer

from penstock.queue.messages import TERMINAL, Finish, Frame, Logprobs, StreamError, Usage, encode, lua_string
from penstock.queue.records import PriorityClass, new_request_id, now_ms
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.token_log import Append, AppendStatus, Dispatch, RequestLog, TokenWriter
from penstock.serving.durable.bodies import for_handler
from penstock.serving.durable.store import RequestStore
from penstock.serving.request import ClientRequest
from penstock.workers.demo_model import demo_model_path
from tests.contract.serving.durable.test_resume import again
from tests.support.simulated_stack import MODEL, SimulatedStack

pytestmark = [pytest.mark.contract, pytest.mark.timeout(700)]

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALLS = (
    'Let me look.<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


def kept(path: str, body: dict[str, Any], choices: int = 1) -> ClientRequest:
    stream_id = new_request_id()
    question = {"messages": [{"role": "user", "content": "?"}]} if path != "/v1/responses" else {"input": "?"}
    whole = {"model": MODEL, "stream": True, "max_tokens": 500} | question | body
    return ClientRequest(
        stream_id=stream_id,
        tenant="default",
        key_id="open",
        path=path,
        body=for_handler(path, json.dumps(whole).encode(), stream_id),
        external_id=new_request_id(),
        priority_class=PriorityClass.STANDARD,
        accepted_ms=now_ms(),
        deadline_ms=now_ms() + 600_000,
        stream=True,
        n=choices,
        choices=choices,
    )


def frames_of(text: str, width: int = 0) -> list[Frame]:
    """One token a frame, as a decode engine gives them; ``width`` > 0: with log probabilities."""
    tokens = Tokenizer.from_file(f"{demo_model_path()}/tokenizer.json").encode(text, add_special_tokens=False).ids
    last = len(tokens) - 1
    return [
        Frame(
            index,
            [token],
            finish=Finish.STOP if index == last else None,
            usage=Usage(5) if index == 0 else None,
            logprobs=_logprobs(token, width) if width else None,
        )
        for index, token in enumerate(tokens)
    ]


def _logprobs(token: int, width: int) -> Logprobs:
    ids = array("i", [token, *range(100, 99 + width)])
    values = array("f", [-0.5 - place for place in range(width)])
    return Logprobs(width, ids.tobytes(), values.tobytes(), array("i", [1]).tobytes())


async def write(stack: SimulatedStack, stored: ClientRequest, logs: list[list[Frame]]) -> None:
    settings = stack.redis_settings
    async with connect_async(settings) as client:
        await RequestStore(client, settings).save(stored)
        await client.set(f"{settings.namespace}replica:scripted", b"1", ex=60)
        work = [Dispatch(id_, 0, "nobody", "scripted", lua_string(encode({})), "t") for id_ in stored.record_ids]
        await RequestLog(client, settings).dispatch("nobody", work)
        await client.delete(f"{settings.namespace}replica:scripted")
    with connect(settings) as blocking:
        writer = TokenWriter(blocking, settings)
        for id_, frames in zip(stored.record_ids, logs, strict=True):
            for frame in frames:
                final = frame.finish is not None
                entry = Append(id_, 1, frame.index, len(frame.tokens), lua_string(encode(frame)), final)
                assert writer.append([entry]) == [AppendStatus.OK]
        writer.close()


def the_same_everywhere(stack: SimulatedStack, http: httpx.Client, stored: ClientRequest) -> list[dict[str, Any]]:
    """Render it whole and from every event on, at both ingresses in turn; what its events hold."""
    whole = again(http, stack.urls[0], stored.stream_id)
    assert whole.status == 200, whole.body
    for after, event_id in enumerate(whole.ids[:-1], 1):
        rest = again(http, stack.urls[after % 2], stored.stream_id, event_id)
        assert rest.body == b"".join(whole.events[after:]), after
    pieces = [event.partition(b"data: ")[2] for event in whole.events]
    return [json.loads(piece) for piece in pieces if not piece.startswith(b"[DONE]")]


def test_tool_calls_keep_their_ids_and_arguments(stack: SimulatedStack, http: httpx.Client) -> None:
    stored = kept("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "auto"})
    asyncio.run(write(stack, stored, [frames_of(CALLS)]))
    documents = the_same_everywhere(stack, http, stored)
    calls: dict[int, list[str]] = {}
    names = {}
    for document in documents:
        for call in document["choices"][0]["delta"].get("tool_calls") or []:
            calls.setdefault(call["index"], []).append(call["function"].get("arguments") or "")
            if call.get("id"):
                names[call["index"]] = call["id"]
    assert [json.loads("".join(parts)) for _, parts in sorted(calls.items())] == [{"city": "Paris"}, {"city": "Rome"}]
    assert len(set(names.values())) == 2
    assert documents[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_log_probabilities(stack: SimulatedStack, http: httpx.Client) -> None:
    stored = kept("/v1/chat/completions", {"logprobs": True, "top_logprobs": 3})
    frames = frames_of("All of these have their probabilities.", width=4)
    asyncio.run(write(stack, stored, [frames]))
    documents = the_same_everywhere(stack, http, stored)
    shown = [document["choices"][0]["logprobs"] for document in documents]
    given = [token for logprobs in shown if logprobs for token in logprobs["content"]]
    assert [token["logprob"] for token in given] == [-0.5] * len(frames)
    assert all(len(token["top_logprobs"]) == 3 for token in given)


def test_a_stop_string_across_frames(stack: SimulatedStack, http: httpx.Client) -> None:
    stored = kept("/v1/chat/completions", {"stop": ["sun rises and"]})
    asyncio.run(write(stack, stored, [frames_of("Here the sun rises and the sun sets.")]))
    documents = the_same_everywhere(stack, http, stored)
    text = "".join(document["choices"][0]["delta"].get("content") or "" for document in documents)
    assert text == "Here the "
    assert documents[-1]["choices"][0]["stop_reason"] == "sun rises and"


def test_usage(stack: SimulatedStack, http: httpx.Client) -> None:
    stored = kept("/v1/chat/completions", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    frames = frames_of("Count me.")
    asyncio.run(write(stack, stored, [frames]))
    documents = the_same_everywhere(stack, http, stored)
    assert documents[-1]["usage"]["completion_tokens"] == len(frames)


@pytest.mark.parametrize(("choices", "told"), [(1, 32), (3, 0)])
def test_cached_tokens_do_not_depend_on_who_is_first(
    stack: SimulatedStack, http: httpx.Client, choices: int, told: int
) -> None:
    body = {"n": choices, "temperature": 1.0, "stream_options": {"include_usage": True}}
    stored = kept("/v1/chat/completions", body, choices)
    logs = [frames_of("Three of a kind.") for _ in range(choices)]
    for choice, frames in enumerate(logs):
        frames[0] = msgspec.structs.replace(frames[0], usage=Usage(64, 32 - 16 * choice))
    asyncio.run(write(stack, stored, logs))
    for url in stack.urls * 3:
        last = again(http, url, stored.stream_id).events[-2].partition(b"data: ")[2]
        assert json.loads(last)["usage"]["prompt_tokens_details"]["cached_tokens"] == told


def test_responses_and_messages(stack: SimulatedStack, http: httpx.Client) -> None:
    for path in ("/v1/responses", "/v1/messages"):
        stored = kept(path, {"tools": []} if path == "/v1/responses" else {})
        asyncio.run(write(stack, stored, [frames_of("One, two and three.")]))
        documents = the_same_everywhere(stack, http, stored)
        assert documents[-1]["type"] in ("response.completed", "message_stop")


def test_a_failed_answer_fails_again(stack: SimulatedStack, http: httpx.Client) -> None:
    """An error is not numbered: whoever resumes is told, whatever it has."""
    stored = kept("/v1/chat/completions", {})
    frames = frames_of("It breaks here.")
    error = Frame(TERMINAL, [], finish=Finish.ERROR, error=StreamError("stream_interrupted", "broken", 502))
    frames[-1] = Frame(frames[-1].index, frames[-1].tokens)
    asyncio.run(write(stack, stored, [[*frames, error]]))
    whole = again(http, stack.urls[0], stored.stream_id)
    assert len(whole.ids) == len(frames) + 1, "the error came before tokens that were there"
    assert b'"code":"stream_interrupted"' in whole.body
    for after in (1, len(whole.ids)):
        rest = again(http, stack.urls[1], stored.stream_id, str(after))
        assert rest.status in (200, 502)
        assert b'"code":"stream_interrupted"' in rest.body
