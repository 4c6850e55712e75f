"""What a row is, and how it is played."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.chaos.outcome import Outcome, Scale, Size
from tests.chaos.round import Round
from tests.support.simulated_stack import Shape, SimulatedStack


@dataclass(frozen=True)
class Row:
    """One row of the report: a fault, the deployment it hits and how hard."""

    name: str
    fault: str
    shape: Shape
    sizes: dict[Scale, Size]
    play: Callable[[Round], Awaitable[None]]
    any_engine: bool = False
    """Whether it also runs on real vLLM engines."""


async def play(row: Row, stack: SimulatedStack, scale: Scale, seed: int, say: Callable[[str], None]) -> Outcome:
    """Play a row on a stack that is up."""
    outcome = Outcome(row.name, row.fault, seed, scale, stack.shape.engine)
    round_ = Round(stack, row.sizes[scale], outcome, say)
    started = time.monotonic()
    if stack.shape.engine == "vllm":
        await round_.learn(prompts=8)
    await row.play(round_)
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome
