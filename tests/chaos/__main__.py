"""``python -m tests.chaos``: break things, and see whether anything was lost."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import structlog
from rich.console import Console

from penstock.queue.local.process import ServerError
from tests.chaos.outcome import Outcome, Scale
from tests.chaos.report import table, verdict, write
from tests.chaos.row import Row, play
from tests.chaos.rows import ROWS
from tests.chaos.stacks import Stacks

RESULTS = Path("results/chaos")
REAL = 2
"""Prefill and decode replicas of real engines, which take 2 GB and a core each: one to kill and one to stand by."""
WIDTH = 160
"""Columns of a report that goes to a file."""


@click.command()
@click.option(
    "--scale", type=click.Choice([scale.value for scale in Scale]), default=Scale.LONG.value, show_default=True
)
@click.option("--short", is_flag=True, help="The same as --scale short: every row, in twenty minutes.")
@click.option("--seed", type=int, default=None, help="Repeats a run; default: a new one, which is printed.")
@click.option("--row", "names", multiple=True, type=click.Choice(list(ROWS)), help="Only this row; may be repeated.")
@click.option(
    "--engine",
    type=click.Choice(["simulated", "vllm"]),
    default="simulated",
    show_default=True,
    help="vllm plays the rows that make sense on real engines.",
)
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def chaos(scale: str, short: bool, seed: int | None, names: tuple[str, ...], engine: str, results: Path) -> None:
    """Kill, stall and cut, and print what clients saw of it."""
    if engine == "vllm" and scale == Scale.TEST and not short:
        raise click.BadParameter("real engines have no test size; use short or long", param_hint="--scale")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # every part is stopped on the way out
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    seed = random.randrange(2**32) if seed is None else seed
    wanted = [ROWS[name] for name in names or ROWS if engine == "simulated" or ROWS[name].real]
    if not wanted:
        raise click.BadParameter(
            f"real engines play {[row.name for row in ROWS.values() if row.real]}", param_hint="--row"
        )
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    written = results / f"{time.strftime('%Y%m%d-%H%M%S')}-{seed}.json"
    console.print(f"seed {seed}; logs in {folder}", highlight=False)
    outcomes: list[Outcome] = []
    with (folder / "load.log").open("a") as log, Stacks(folder) as stacks:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(log))  # what the load's own clients say
        for row in wanted:
            console.rule(row.name)
            outcomes.append(_play(row, stacks, Scale.SHORT if short else Scale(scale), seed, engine, console))
            console.print(verdict(outcomes[-1]), f"({outcomes[-1].seconds} s)")
            write(outcomes, written)  # after each: a round of two hours may be broken off
    console.print(table(outcomes))
    console.print(f"seed {seed}; {written}", highlight=False)
    sys.exit(any(outcome.failed for outcome in outcomes))


def _play(row: Row, stacks: Stacks, scale: Scale, seed: int, engine: str, console: Console) -> Outcome:
    try:
        with console.status(f"{row.fault}: starting") as status:
            stack = stacks.of(
                row.shape if engine == "simulated" else replace(row.shape, engine=engine, prefill=REAL, decode=REAL)
            )
            return asyncio.run(play(row, stack, scale, seed, lambda text: status.update(f"{row.fault}: {text}")))
    except ServerError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    chaos()
