"""The order in which lines run: neighbours share as much of their prompts as possible, so that prefix caches work.

Sorting prompts by their bytes puts equal beginnings side by side, whatever their length: it walks the tree of prefixes
depth first. Only a bounded number of lines is looked at, block by block; every second block goes backwards, so that it
begins with the prefix the one before it ended with.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from functools import lru_cache

import msgspec

from penstock.serving.batches.lines import RawLine


class _Prompt(msgspec.Struct):
    """What a chat template or a completion begins with, in the order in which it does."""

    tools: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


class _Line(msgspec.Struct):
    body: _Prompt


@lru_cache(maxsize=1)
def _decoder() -> msgspec.json.Decoder[_Line]:
    return msgspec.json.Decoder(_Line)


def prompt_key(data: bytes) -> tuple[bytes, ...]:
    """Compares as the prompts' beginnings do."""
    prompt = _decoder().decode(data).body
    parts = (prompt.tools, prompt.instructions, prompt.messages, prompt.prompt, prompt.input)
    return tuple(bytes(part) for part in parts)


async def in_prompt_order(
    lines: AsyncIterable[RawLine], max_lines: int, max_bytes: int
) -> AsyncGenerator[RawLine, None]:
    """The same lines, each of the :func:`blocks` sorted by :func:`prompt_key`."""
    backwards = False
    async with aclosing(blocks(lines, max_lines, max_bytes)) as unsorted:
        async for block in unsorted:
            for line in _sorted(block, backwards):
                yield line
            backwards = not backwards


async def blocks(lines: AsyncIterable[RawLine], max_lines: int, max_bytes: int) -> AsyncGenerator[list[RawLine], None]:
    """The same lines, so many at a time, or fewer as soon as they have so many bytes."""
    size, block = 0, list[RawLine]()
    async for line in lines:
        block.append(line)
        size += len(line.data or b"")
        if len(block) >= max_lines or size >= max_bytes:
            yield block
            size, block = 0, []
    if block:
        yield block


def _sorted(block: list[RawLine], backwards: bool) -> list[RawLine]:
    return sorted(block, key=lambda line: prompt_key(line.data or b""), reverse=backwards)
