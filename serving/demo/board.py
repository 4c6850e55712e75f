"""The progress lines: one per part, with the seconds it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class Board:
    """Shows every part's state: live on a terminal, else one line as each gets ready."""

    def __init__(self, console: Console, parts: list[str]) -> None:
        self._console = console
        self._started = time.monotonic()
        self._took: dict[str, float | None] = dict.fromkeys(parts)
        self._spinner = Spinner("dots")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keep the lines up to date inside this block."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=8):
            yield

    def ready(self, part: str) -> None:
        """This part is ready now."""
        self._took[part] = took = time.monotonic() - self._started
        if not self._console.is_terminal:
            self._console.print(f"{part} ready after {took:.1f} s", highlight=False)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        elapsed = time.monotonic() - self._started
        for part, took in self._took.items():
            mark = self._spinner if took is None else Text("✓", style="green")
            seconds = Text(f"{elapsed if took is None else took:5.1f} s", style="dim" if took is None else "")
            table.add_row(mark, part, seconds)
        return table
