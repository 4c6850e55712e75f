"""What is shown: progress while it runs, tables at the end, Markdown for the documentation."""

from __future__ import annotations

from collections import defaultdict
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

from tests.benchmarks.figures import CPU_PREFIX
from tests.benchmarks.results import Result, Row, Sheet, Spread

_LABELS = {
    "output_tokens_per_s": "output tokens/s",
    "requests_per_s": "requests/s",
    "ttft_ms": "TTFT {} (ms)",
    "itl_ms": "ITL {} (ms)",
    "second_token_gap_ms": "first to second token {} (ms)",
    "e2e_ms": "end to end {} (ms)",
    "tokens_per_event": "tokens per event",
    "same_answers": "same answers (share)",
    "other_side_cores": "cores used by the idle other side",
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
    """A table a comparison with the figures that matter most."""
    return [
        _table(
            f"Penstock {name} / {result.reference}: median of {result.settings['rounds']} rounds",
            result,
            name,
        )
        for name in result.summary
    ]


def _table(title: str, result: Result, comparison: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("", f"{result.reference} alone", result.reference, comparison, "ratio", "low - high"):
        table.add_column(heading, justify="left" if not heading else "right")
    for workload, rows in result.summary[comparison].items():
        table.add_section()
        table.add_row(f"[bold]{workload}")
        for name in _SHOWN_AT_THE_END:
            row = rows[name]
            ratio = row.ratio
            spread = f"{ratio.low:.2f} - {ratio.high:.2f}" if ratio else ""
            values = [_value(side) for side in (row.alone, row.reference, row.subject, ratio)]
            table.add_row(_label(name), *values, spread)
    return table


def markdown(result: Result) -> str:
    """The tables of the benchmark page, in full."""
    parts = [_preface(result)]
    for comparison, workloads in result.summary.items():
        for workload, rows in workloads.items():
            parts.append(f"### {comparison}, {workload}\n\n{_figures(rows, result.reference, comparison)}")
    parts.append(f"### Start, memory, idle\n\n{_sheets(result.contenders)}")
    return "\n\n".join(parts) + "\n"


def _preface(result: Result) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {number}" for name, number in result.software.items())
    settings = result.settings
    return (
        f"Measured {result.started} on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB (load average before: {machine['load_average_before']}); {versions}. "
        f"Model {settings['model']}, dtype {settings['dtype']}. "
        f"Medians of {settings['rounds']} rounds, sides interleaved; ratio is Penstock / {result.reference} "
        "of the same round, with its lowest and highest."
    )


def _figures(rows: dict[str, Row], reference: str, subject: str) -> str:
    body = [
        [
            _label(name),
            *(_value(side) for side in (row.alone, row.reference, row.subject, row.ratio)),
            _range(row.ratio),
        ]
        for name, row in rows.items()
    ]
    return _markdown_table(["", f"{reference} alone", reference, subject, "ratio", "low – high"], body)


def _sheets(contenders: dict[str, Sheet]) -> str:
    columns: list[dict[str, str]] = [_sheet(sheet) for sheet in contenders.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    body = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return _markdown_table(["", *contenders], body)


def _sheet(sheet: Sheet) -> dict[str, str]:
    cores: defaultdict[str, float] = defaultdict(float)
    for process in sheet.idle:
        cores[process.group] += process.cores
    rows = {f"ready: {part} (s)": f"{seconds:.1f}" for part, seconds in sheet.ready_s.items()}
    rows |= {f"peak RSS: {group} (MB)": f"{mb:,.0f}" for group, mb in sheet.peak_rss_mb.items()}
    rows["peak RSS: all (MB)"] = f"{sum(sheet.peak_rss_mb.values()):,.0f}"
    rows |= {f"idle: {group} (cores)": f"{used:.3f}" for group, used in cores.items()}
    rows["idle: all (cores)"] = f"{sum(cores.values()):.3f}"
    rows["processes left behind"] = str(len(sheet.left_behind))
    return rows


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def _label(name: str) -> str:
    if name.startswith(CPU_PREFIX):
        return f"CPU s per 1,000 tokens: {name.removeprefix(CPU_PREFIX)}"
    if name in _LABELS:
        return _LABELS[name]
    stem, _, percentile = name.rpartition("_")
    return _LABELS[stem].format(percentile)


def _value(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.median:,.0f}" if abs(spread.median) >= 100 else f"{spread.median:.3g}"


def _range(spread: Spread | None) -> str:
    return f"{spread.low:.2f} – {spread.high:.2f}" if spread else "–"
