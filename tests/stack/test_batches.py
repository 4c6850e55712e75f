"""Batches on real engines, with interactive streams beside them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.stack.conftest import MODEL
from tests.support.batch_server import jsonl, line, rows, submit, until

pytestmark = [pytest.mark.stack, pytest.mark.asyncio, pytest.mark.timeout(700)]
END_S = 300


def counted(number: int) -> str:
    return " ".join(str(n) for n in range(1, number + 1))


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Count to {number}."}]


async def run(api: openai.AsyncOpenAI, endpoint: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers' bodies, in the order of the requests."""
    lines = [line(f"c{i}", url=endpoint, body={"model": MODEL, "temperature": 0, **b}) for i, b in enumerate(bodies)]
    batch = await submit(api, jsonl(lines), endpoint=endpoint, metadata={"ordered": "true"})
    batch = await until(api, batch.id, "completed", "failed", within_s=END_S)
    assert (batch.status, batch.error_file_id) == ("completed", None), batch
    return [row["response"]["body"] for row in await rows(api, batch.output_file_id)]


async def test_a_batch_beside_interactive_streams(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        numbers = [5 + i % 30 for i in range(60)]
        batch = asyncio.create_task(run(api, "/v1/chat/completions", [{"messages": question(n)} for n in numbers]))
        streams = 0
        while not batch.done():
            answer = await api.chat.completions.create(
                model=MODEL, messages=question(20), temperature=0, stream=True, service_tier="priority"
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])
            assert text == counted(20)
            streams += 1
        assert streams > 0
        answers = [body["choices"][0]["message"]["content"] for body in await batch]
        asked = [
            await api.chat.completions.create(model=MODEL, messages=question(n), temperature=0) for n in numbers[:30]
        ]
        assert answers == [each.choices[0].message.content for each in asked] * 2


async def test_completions_and_responses(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        texts = await run(api, "/v1/completions", [{"prompt": ["1 2 3", "4 5 6"], "max_tokens": 4}] * 3)
        assert all(len(body["choices"]) == 2 for body in texts)
        assert all(body["choices"][0]["text"] == texts[0]["choices"][0]["text"] for body in texts)
        answers = await run(api, "/v1/responses", [{"input": "Count to 20."}] * 3)
        assert [body["output"][-1]["content"][0]["text"] for body in answers] == [counted(20)] * 3


async def test_what_a_model_cannot_take_is_that_lines_error(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        bodies = [
            {"messages": question(5)},
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            {"messages": "none"},
            {"messages": question(5), "temperature": -5},
            {"messages": question(5), "logit_bias": [[[[[]]]]]},
        ]
        lines = [line(f"c{i}", body={"model": MODEL} | body) for i, body in enumerate(bodies)]
        batch = await until(api, (await submit(api, jsonl(lines))).id, "completed", within_s=END_S)
        errors = await rows(api, batch.error_file_id)
        assert [row["custom_id"] for row in await rows(api, batch.output_file_id)] == ["c0"]
        assert sorted(row["custom_id"] for row in errors) == ["c1", "c2", "c3", "c4"]
        assert {row["response"]["status_code"] for row in errors} == {400}
        assert all(row["response"]["body"]["error"]["message"] for row in errors)
