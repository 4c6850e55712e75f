"""The report: a line a row on the screen, everything as JSON under ``results/chaos``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from tests.chaos.outcome import Outcome

_COLUMNS = (
    "row", "faults", "requests", "finished", "lost", "repeated", "altered", "gap p95", "re-run", "verdict",
)  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row per fault."""
    report = Table(title=f"Chaos, seed {outcomes[0].seed}" if outcomes else "Chaos")
    for column in _COLUMNS:
        report.add_column(column, justify="left" if column in ("row", "verdict") else "right")
    for outcome in outcomes:
        report.add_row(
            outcome.row,
            *(f"{n:,}" for n in (outcome.injected, outcome.requests, outcome.finished, outcome.lost, outcome.repeated)),
            f"{outcome.altered:,}",
            f"{outcome.gap_p95_s:.2f} s",
            f"{outcome.reexecuted:.1%}",
            verdict(outcome),
        )
    return report


def verdict(outcome: Outcome) -> str:
    """In words: what did not hold, else the figures of this row."""
    if outcome.failed:
        return "[red]" + escape("; ".join(f"{check.invariant} {check.what}: {check.found}" for check in outcome.failed))
    figures = ", ".join(f"{name} {value:,.4g}" for name, value in outcome.figures.items())
    return f"[green]holds[/] {figures}"


def write(outcomes: Sequence[Outcome], path: Path) -> None:
    """What was found so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes), indent=1))
