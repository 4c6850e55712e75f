"""A slice of a production trace, made small enough for this machine.

The trace is Mooncake's conversation trace (FAST'25): when requests came, how long they were, and which blocks of 512
prompt tokens they share. All lengths, that of a block too, are divided by one number; time is stretched until the
slice offers a given share of what the machine was just measured to do.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile, islice
from pathlib import Path

import msgspec

from tests.benchmarks.workloads import Arrival, Workload

TRACE = Path("mooncake", "mooncake_conversation.csv.gz")
TRACE_BLOCK_TOKENS = 512
"""Tokens that one entry of ``hash_ids`` stands for."""
LENGTH_DIVISOR = 16
"""Half of the trace's prompts have more than 7,000 tokens; the model here takes 2,048, in a third of a second."""
LONGEST_PROMPT = 1500
SHORTEST = 2
"""Of a prompt, that begins with a special token, and of an answer: after one token there is nothing to decode."""
START_S = 600.0
"""Ten minutes in, when the trace's first rush is over."""
REQUESTS = 20
"""About four seconds of work on two cores."""
LOAD = 0.5
"""Offered load as a share of the measured capacity."""
CAPACITY_STREAMS = 32
"""Streams of the closed-loop run that measures capacity: enough to saturate every contender."""
NAME = f"replay at {LOAD:.0%} load"


def read_slice(folder: Path) -> list[Arrival] | None:
    """The slice with its lengths divided and its own clock from 0; None when there is no trace below ``folder``."""
    path = folder / TRACE
    if not path.exists():
        return None
    with gzip.open(path, "rt", newline="") as lines:
        return scaled(csv.DictReader(lines))


def scaled(rows: Iterable[Mapping[str, str]]) -> list[Arrival]:
    """The first :data:`REQUESTS` rows from :data:`START_S` on."""
    chosen = list(islice(dropwhile(lambda row: float(row["timestamp_s"]) < START_S, rows), REQUESTS))
    first = float(chosen[0]["timestamp_s"])
    return [_arrival(row, first) for row in chosen]


def _arrival(row: Mapping[str, str], first_s: float) -> Arrival:
    prompt = min(max(SHORTEST, int(row["input_tokens"]) // LENGTH_DIVISOR), LONGEST_PROMPT)
    whole_blocks = prompt // (TRACE_BLOCK_TOKENS // LENGTH_DIVISOR)
    return Arrival(
        at_s=float(row["timestamp_s"]) - first_s,
        prompt_tokens=prompt,
        output_tokens=max(SHORTEST, int(row["output_tokens"]) // LENGTH_DIVISOR),
        blocks=tuple(int(block) for block in row["hash_ids"].split()[:whole_blocks]),
    )


def capacity_run(arrivals: Sequence[Arrival]) -> Workload:
    """The slice's requests as fast as they are answered."""
    return _workload("capacity", arrivals, open_loop=False)


def replay(arrivals: Sequence[Arrival], capacity_s: float) -> Workload:
    """The slice in its own rhythm, stretched to offer :data:`LOAD` of a capacity of one slice in ``capacity_s``."""
    last_s = max(arrivals[-1].at_s, 1e-9)
    stretch = capacity_s / LOAD / last_s
    timed = [msgspec.structs.replace(arrival, at_s=arrival.at_s * stretch) for arrival in arrivals]
    return _workload(NAME, timed, open_loop=True)


def _workload(name: str, arrivals: Sequence[Arrival], *, open_loop: bool) -> Workload:
    return Workload(
        name,
        concurrency=0 if open_loop else CAPACITY_STREAMS,
        prompt_tokens=0,
        output_tokens=0,
        requests=len(arrivals),
        arrivals=tuple(arrivals),
        block_tokens=TRACE_BLOCK_TOKENS // LENGTH_DIVISOR,
        open_loop=open_loop,
    )
