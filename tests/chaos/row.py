"""What a row is, and how it is played."""

from __future__ import annotations

import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

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
    real: dict[Scale, Size] = field(default_factory=dict)
    """How hard real vLLM engines are hit, which start in half a minute on two cores; empty: not played on them."""

    def size(self, scale: Scale, engine: str) -> Size:
        """How large it is played on an engine of this kind."""
        return (self.real if engine == "vllm" else self.sizes)[scale]


async def play(row: Row, stack: SimulatedStack, scale: Scale, seed: int, say: Callable[[str], None]) -> Outcome:
    """Play a row on a stack that is up. A row that cannot be played to its end has failed; it does not raise."""
    outcome = Outcome(row.name, row.fault, seed, scale, stack.shape.engine)
    round_ = Round(stack, row.size(scale, stack.shape.engine), outcome, say)
    started = time.monotonic()
    try:
        if stack.shape.engine == "vllm":
            await round_.learn(prompts=8)
        await row.play(round_)
    except Exception as error:  # whatever it is, the rows after it are still to be played
        traceback.print_exc()
        outcome.check("", "it is played to its end", False, repr(error))
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome
