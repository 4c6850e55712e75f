"""``python -m tests.benchmarks``: measure, and render what was measured."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
from rich.console import Console

from penstock.queue.local.process import ServerError
from penstock.serving.demo.processes import adopt_orphans
from penstock.workers.demo_model import demo_model_path
from tests.benchmarks.contender import ContenderError, Model
from tests.benchmarks.figures import RoundError
from tests.benchmarks.load import LoadError
from tests.benchmarks.report import Board, markdown, tables
from tests.benchmarks.results import LATEST, read
from tests.benchmarks.session import Plan, Session
from tests.benchmarks.sides import PENSTOCK_SHAPES
from tests.benchmarks.workloads import QUICK

RESULTS = Path("results")
_FAILURES = (ContenderError, LoadError, RoundError, ServerError)


@click.group()
def benchmarks() -> None:
    """Penstock against vLLM's own OpenAI server."""


@benchmarks.command()
@click.option(
    "--contender",
    "contenders",
    multiple=True,
    type=click.Choice(list(PENSTOCK_SHAPES)),
    default=("mixed-redis", "pd-kafka"),
    show_default=True,
    help="Shape of Penstock to measure; may be given several times.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--idle-seconds", default=5.0, show_default=True, help="How long idle CPU is watched, per contender.")
@click.option("--model", default="", help="Folder of the model; default: the demo model.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Processors without AMX or AVX-512 crawl in 16 bits.",
)
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def quick(contenders: tuple[str, ...], rounds: int, idle_seconds: float, model: str, dtype: str, results: Path) -> None:
    """Three short workloads, both sides warm and interleaved."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(soft_wrap=True)
    board = Board(console)
    path = str(Path(model or demo_model_path()).resolve())
    session = Session(Plan(contenders, QUICK, rounds, idle_seconds, Model(path, dtype)), board)
    try:
        with board.live():
            written = session.run(results)
    except _FAILURES as failure:
        raise click.ClickException(f"{failure}\nLogs: {results / 'logs'}") from failure
    for table in tables(session.result):
        console.print(table)
    console.print(f"{session.result.seconds:.0f} s; {written} ({results / LATEST})", highlight=False)


@benchmarks.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def report(result: Path) -> None:
    """Print RESULT as the Markdown tables of the documentation."""
    click.echo(markdown(read(result)), nl=False)


if __name__ == "__main__":
    benchmarks()
