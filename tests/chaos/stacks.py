"""One running deployment at a time, kept from row to row while they want the same shape."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.simulated_stack import Shape, SimulatedStack


class Stacks:
    """``with Stacks() as stacks: stacks.of(shape)``."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.mkdtemp(prefix="chaos"))
        self._stack: SimulatedStack | None = None
        self._count = 0

    def of(self, shape: Shape) -> SimulatedStack:
        """A healthy stack of this shape."""
        if self._stack is not None and self._stack.shape == shape:
            self._stack.heal()
            return self._stack
        self.close()
        self._count += 1
        stack = SimulatedStack(self._folder / str(self._count), shape)
        with_all = stack.__enter__()
        self._stack = with_all
        return with_all

    def close(self) -> None:
        """Stop what runs."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
