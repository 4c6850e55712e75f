"""One running deployment at a time, kept from row to row while they want the same shape."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.simulated_stack import Shape, SimulatedStack


class Stacks:
    """``with Stacks(folder) as stacks: stacks.of(shape)``; ``folder`` gets the logs, a folder a deployment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack: SimulatedStack | None = None
        self._running = ExitStack()
        self._count = 0

    def of(self, shape: Shape) -> SimulatedStack:
        """A healthy deployment of this shape."""
        if self._stack is not None and self._stack.shape == shape:
            self._stack.heal()
            return self._stack
        self.close()
        self._count += 1
        self._stack = self._running.enter_context(SimulatedStack(self._folder / str(self._count), shape))
        return self._stack

    def close(self) -> None:
        """Stop what runs."""
        self._stack = None
        self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
