"""``python -m tests.benchmarks``: measure, and render what was measured."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from msgspec import ValidationError
from rich.console import Console

from penstock.queue.local.process import ServerError
from penstock.serving.demo.processes import adopt_orphans
from penstock.workers.demo_model import demo_model_path
from tests.benchmarks.contender import ContenderError, Model
from tests.benchmarks.figures import RoundError
from tests.benchmarks.load import LoadError
from tests.benchmarks.report import Board, tables
from tests.benchmarks.results import LATEST, LATEST_SCALE, Result, read
from tests.benchmarks.rig import RigError
from tests.benchmarks.scale import Scale
from tests.benchmarks.session import Plan, Session
from tests.benchmarks.sides import NAMES, pairs_of
from tests.benchmarks.workloads import SETS

RESULTS = Path("results")
PAGE = Path("docs", "benchmarks.md")
PLOTS = Path("docs", "plots")
TRACES = Path("..", "shared", "traces")
BUSY_CORES = 0.3
"""A machine that does nothing else uses a tenth."""
_FAILURES = (ContenderError, LoadError, RigError, RoundError, ServerError)

_results = click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
_model = click.option("--model", default="", help="Folder of the model; default: the demo model.")
_dtype = click.option(
    "--dtype", default="float32", show_default=True, help="Processors without AMX or AVX-512 crawl in 16 bits."
)


class _Words(click.ParamType[tuple[str, ...]]):
    """Names, with commas or blanks between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(value.replace(",", " ").split()) if isinstance(value, str) else tuple(value)
        if unknown := [name for name in names if name not in NAMES]:
            self.fail(f"no contender is called {', '.join(unknown)}; there are {', '.join(NAMES)}", param, ctx)
        return names


@click.group()
def benchmarks() -> None:
    """Penstock against vLLM's own OpenAI server and Ray Serve LLM, and everything but the model by itself."""


@benchmarks.command()
@click.option(
    "--contenders",
    default=NAMES,
    type=_Words(),
    help=f"Whom to measure, of {', '.join(NAMES[1:])}; default: all. Each is measured against a reference.",
)
@click.option(
    "--workloads",
    default="full",
    show_default=True,
    type=click.Choice(list(SETS)),
    help="full: all for the main pairs, short for those that vary a queue or a setting; all: everything.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--idle-seconds", default=5.0, show_default=True, help="How long idle CPU is watched, per contender.")
@click.option(
    "--traces",
    default=TRACES,
    show_default=True,
    envvar="PENSTOCK_TRACES",
    type=click.Path(path_type=Path),
    help="Folder of the traces; the replay is left out when there is none.",
)
@click.option("--replay/--no-replay", default=True, show_default=True)
@_model
@_dtype
@_results
def run(
    contenders: tuple[str, ...],
    workloads: str,
    rounds: int,
    idle_seconds: float,
    traces: Path,
    replay: bool,
    model: str,
    dtype: str,
    results: Path,
) -> None:
    """Contenders in pairs, warm and interleaved."""
    plan = Plan(
        pairs_of(contenders),
        SETS[workloads],
        rounds,
        idle_seconds,
        _named(model, dtype),
        traces if replay else None,
        everywhere=workloads == "all",
    )
    _measure(lambda board: Session(plan, board), results, LATEST)


@benchmarks.command()
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(min=1))
@_model
@_dtype
@_results
def scale(rounds: int, model: str, dtype: str, results: Path) -> None:
    """Everything but the model: simulated engines whose steps take no time."""
    _measure(lambda board: Scale(rounds, _named(model, dtype), board), results, LATEST_SCALE)


@benchmarks.command()
@click.argument("paths", metavar="[RESULT]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def report(paths: tuple[Path, ...]) -> None:
    """Write the RESULTs into docs/benchmarks.md, with plots; without any, the newest of each kind."""
    from tests.benchmarks.pages import PageError, markdown, write_into
    from tests.benchmarks.plots import draw

    newest = (RESULTS / LATEST, RESULTS / LATEST_SCALE)
    try:
        found = [read(path) for path in paths or [path for path in newest if path.exists()]]
        if not found:
            raise click.ClickException(f"there is nothing in {RESULTS}: measure first")
        drawn = [(title, f"{PLOTS.name}/{name}") for title, name in draw(found, PLOTS)]
        write_into(PAGE, markdown(found, drawn))
    except (PageError, ValidationError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{PAGE}; {len(drawn)} plots in {PLOTS}")


def _named(model: str, dtype: str) -> Model:
    return Model(str(Path(model or demo_model_path()).resolve()), dtype)


def _measure(make: Callable[[Board], Session | Scale], results: Path, newest: str) -> None:
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(soft_wrap=True)
    board = Board(console)
    measuring = make(board)
    if (busy := measuring.result.machine["busy_cores_before"]) > BUSY_CORES:
        board.say(f"WARNING: others use {busy} cores of this machine: the figures will be worthless")
    try:
        with board.live():
            written = measuring.run(results)
    except _FAILURES as failure:
        raise click.ClickException(f"{failure}\nLogs: {results / 'logs'}") from failure
    _show(console, measuring.result)
    console.print(f"{measuring.result.seconds:.0f} s; {written} ({results / newest})", highlight=False)


def _show(console: Console, result: Result) -> None:
    for table in tables(result):
        console.print(table)


if __name__ == "__main__":
    benchmarks()
