"""What is asked of every contender."""

from __future__ import annotations

import msgspec


class Workload(msgspec.Struct, frozen=True):
    """One round: ``requests`` completions, ``concurrency`` of them open at any time. Special tokens count."""

    name: str
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int


QUICK = (
    Workload("1 stream, 101/32", concurrency=1, prompt_tokens=101, output_tokens=32, requests=10),
    Workload("32 streams, 101/32", concurrency=32, prompt_tokens=101, output_tokens=32, requests=96),
    Workload("1 stream, 1500/32", concurrency=1, prompt_tokens=1500, output_tokens=32, requests=4),
)
"""One to two seconds a round on two idle cores."""
