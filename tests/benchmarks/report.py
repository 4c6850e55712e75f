"""What is shown on the terminal: progress while it runs, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from tests.benchmarks.figures import CPU_PREFIX, spread
from tests.benchmarks.results import Comparison, Result, Scaled, Spread

_LABELS = {
    "output_tokens_per_s": "output tokens/s",
    "requests_per_s": "requests/s",
    "ttft_ms": "TTFT {} (ms)",
    "itl_ms": "ITL {} (ms)",
    "second_token_gap_ms": "first to second token {} (ms)",
    "e2e_ms": "end to end {} (ms)",
    "tokens_per_event": "tokens per event",
    "same_answers": "same answers (share)",
}
_SHOWN_AT_THE_END = (
    "output_tokens_per_s",
    "ttft_ms_p50",
    "ttft_ms_p95",
    "itl_ms_p50",
    "itl_ms_p99",
    "second_token_gap_ms_p50",
    CPU_PREFIX + "all",
)


class Board:
    """Progress: on a terminal bars, and spinners for what has no steps; else one line an event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show progress inside this block."""
        with self._progress:
            yield

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Something without steps is under way."""
        task = self._progress.add_task(what, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)

    @contextmanager
    def progress(self, what: str, steps: int) -> Iterator[Callable[[], None]]:
        """Something with steps; call the given function after each."""
        self.say(f"measuring {what}")
        task = self._progress.add_task(what, total=steps)
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)


def tables(result: Result) -> list[Table]:
    """A table a pair with the figures that matter most; for a run without contenders, one of what was scaled."""
    pairs = [_table(comparison, result.settings["rounds"]) for comparison in result.comparisons]
    return pairs + ([_scaled(result.scale)] if result.scale else [])


def _table(comparison: Comparison, rounds: int) -> Table:
    table = Table(title=f"{comparison.name}: median of {rounds} rounds", title_justify="left")
    for heading in ("", comparison.reference, comparison.subject, "ratio", "low - high"):
        table.add_column(heading, justify="left" if not heading else "right")
    for workload, rows in comparison.workloads.items():
        table.add_section()
        table.add_row(f"[bold]{workload}")
        for name in _SHOWN_AT_THE_END:
            row = rows[name]
            between = f"{row.ratio.low:.2f} - {row.ratio.high:.2f}" if row.ratio else ""
            table.add_row(label(name), *(number(side) for side in (row.reference, row.subject, row.ratio)), between)
    return table


def _scaled(scale: Sequence[Scaled]) -> Table:
    table = Table(title="everything but the model", title_justify="left")
    for heading in ("", "at", "figure", "median", "low - high"):
        table.add_column(heading, justify="right" if "m" in heading[:1] or "-" in heading else "left")
    for one in scale:
        found = spread(one.values)
        assert found is not None, "a figure has values"
        low, high = (number(Spread(value, value, value)) for value in (found.low, found.high))
        table.add_row(one.part, one.at, one.figure, number(found), f"{low} - {high}")
    return table


def label(name: str) -> str:
    """What a figure is called in a table."""
    if name.startswith(CPU_PREFIX):
        return f"CPU s per 1,000 tokens: {name.removeprefix(CPU_PREFIX)}"
    if name in _LABELS:
        return _LABELS[name]
    stem, _, percentile = name.rpartition("_")
    return _LABELS[stem].format(percentile) if stem in _LABELS else name.replace("_per_s", "/s").replace("_", " ")


def number(found: Spread | None) -> str:
    """The median, to three digits."""
    if found is None:
        return "–"
    return f"{found.median:,.0f}" if abs(found.median) >= 100 else f"{found.median:.3g}"
