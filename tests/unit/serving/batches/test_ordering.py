"""Lines with the same beginning run side by side."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serving.batches.lines import RawLine
from penstock.serving.batches.ordering import in_prompt_order, prompt_key

pytestmark = pytest.mark.unit


def line(at: int, **body: object) -> RawLine:
    return RawLine(at, json.dumps({"custom_id": f"{at}", "body": body}).encode())


def ordered(lines: list[RawLine], max_lines: int = 1000, max_bytes: int = 10**9) -> list[RawLine]:
    async def given_lines() -> AsyncIterator[RawLine]:
        for each in lines:
            yield each

    async def collect() -> list[RawLine]:
        return [each async for each in in_prompt_order(given_lines(), max_lines, max_bytes)]

    return asyncio.run(collect())


@given(st.lists(st.text(max_size=3)), st.integers(1, 10), st.integers(1, 500))
def test_every_line_once_and_not_far_from_its_place(prompts: list[str], max_lines: int, max_bytes: int) -> None:
    lines = [line(at, prompt=prompt) for at, prompt in enumerate(prompts)]
    found = ordered(lines, max_lines, max_bytes)
    assert sorted(found) == lines
    assert all(abs(place - each.at) < max_lines for place, each in enumerate(found))


def test_a_system_prompt_changes_as_seldom_as_possible() -> None:
    chance = random.Random(1)
    systems = [chance.randrange(10) for _ in range(300)]
    chats = [
        line(at, messages=[{"role": "system", "content": f"{system}"}, {"role": "user", "content": f"{at}"}])
        for at, system in enumerate(systems)
    ]
    found = [systems[each.at] for each in ordered(chats, max_lines=100)]
    changes = sum(a != b for a, b in pairwise(found))
    assert changes == 27  # nine in each of three blocks; none between them, as every second one runs backwards


def test_tools_come_before_messages_as_in_a_template() -> None:
    first, second = line(0, tools=[{"a": 1}], messages=[{"z": 1}]), line(1, tools=[{"b": 1}], messages=[{"a": 1}])
    assert prompt_key(first.data or b"") < prompt_key(second.data or b"")
