"""``penstock batch run`` without Ray: ``python -m tests.support.local_run_beside URL LINES OUTPUT DEATH``.

The parts are a server that is up already, and one that dies when the file DEATH appears.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from penstock.serving.batches import local_run
from penstock.serving.demo.board import Board
from penstock.serving.demo.stack import PartFailed
from tests.support.waiting import eventually_async

LIFETIME_S = 100.0


class Beside:
    """What :class:`penstock.serving.demo.stack.Stack` is to a local run."""

    def __init__(self, *_: Any) -> None:
        self.url = sys.argv[1]

    def parts(self) -> list[str]:
        """The one that dies."""
        return ["engine"]

    async def start(self, board: Board) -> None:
        """It is up."""
        board.ready("engine")

    async def watch(self) -> None:
        """Raises :class:`PartFailed` when the engine dies."""

        async def died() -> bool:
            return await asyncio.to_thread(Path(sys.argv[4]).exists)

        await eventually_async(died, LIFETIME_S, "the engine dies")
        raise PartFailed("engine", "it died")

    async def stop(self) -> None:
        """Leaves the server as it is, whose batch never ends."""


if __name__ == "__main__":
    local_run.Stack = Beside  # type: ignore[assignment,misc]
    job = local_run.Job(Path(sys.argv[2]), "/v1/chat/completions", Path(sys.argv[3]))
    sys.exit(local_run.local_run(job, ""))
