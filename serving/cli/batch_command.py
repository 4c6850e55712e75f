"""``penstock batch``: asynchronous jobs from the command line."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from penstock.serving.batches.client import BatchClient
from penstock.serving.batches.offline import check, endpoint_of
from penstock.serving.batches.output import save
from penstock.serving.batches.rows import RowRequest, is_table, request_lines
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.watching import Prices, is_open
from penstock.serving.batches.watching import watch as watch_batch

SHOWN_PROBLEMS = 20
DEFAULT_ENDPOINT = "/v1/chat/completions"
DEFAULT_URL = "http://127.0.0.1:8000/v1"
INTERRUPTED = 130
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT = click.Path(dir_okay=False, path_type=Path)


@click.group("batch")
@click.option("--base-url", envvar=["PENSTOCK_BASE_URL", "OPENAI_BASE_URL"], default=DEFAULT_URL, show_default=True)
@click.option("--api-key", envvar=["PENSTOCK_API_KEY", "OPENAI_API_KEY"], default="", help="Where keys are needed.")
@click.pass_context
def command(context: click.Context, base_url: str, api_key: str) -> None:
    context.obj = lambda: BatchClient(base_url, api_key)


def _row_options(function: Any) -> Any:
    """Options of how rows of a table become requests."""
    for option in (
        click.option("--max-tokens", type=click.IntRange(1), help="Longest answer to a row."),
        click.option("--id-column", default="", help="Column with the custom ids; row numbers if not given."),
        click.option("--system", default="", help="System prompt of a row, a template too."),
        click.option("--template", default="", help="Prompt of a row of a CSV or Parquet file, with {column}s."),
        click.option("--model", default="", help="Model, for CSV and Parquet files."),
        click.option("--endpoint", default="", help="That of the file's lines, or /v1/chat/completions."),
    ):
        function = option(function)
    return function


def _price_options(function: Any) -> Any:
    for name in ("output", "input"):
        option = click.option(
            f"--{name}-price",
            type=float,
            default=0.0,
            envvar=f"PENSTOCK_{name.upper()}_PRICE",
            help="Of a million tokens.",
        )
        function = option(function)
    return function


@command.command()
@click.argument("file", type=_FILE)
@_row_options
@click.option("--window", default="24h", show_default=True, help="Time to finish in, 1h to 7d.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Up to 16.")
@click.option("--ordered", is_flag=True, help="Results in the order of the input.")
@click.pass_obj
def submit(connect: Any, /, file: Path, window: str, metadata: tuple[str, ...], ordered: bool, **how: Any) -> None:
    """Upload FILE (JSONL, CSV or Parquet), start a batch and print its id."""
    pairs = dict(_pair(text) for text in metadata) | ({"ordered": "true"} if ordered else {})
    with connect() as client, _as_jsonl(file, how) as lines:
        endpoint = how["endpoint"] or endpoint_of(lines) or DEFAULT_ENDPOINT
        click.echo(client.create(client.upload(lines)["id"], endpoint, window, pairs)["id"])


@command.command()
@click.argument("batch_id", metavar="ID")
@_price_options
@click.pass_obj
def watch(connect: Any, /, batch_id: str, input_price: float, output_price: float) -> None:
    """Show progress until the batch has ended. Ctrl-C leaves it running."""
    with connect() as client:
        try:
            batch = watch_batch(client, batch_id, Console(stderr=True), Prices(input_price, output_price))
        except KeyboardInterrupt:
            click.echo(f"{batch_id} goes on; `penstock batch watch {batch_id}` shows it again.", err=True)
            sys.exit(INTERRUPTED)
    _print_problems(batch)
    click.echo(batch["status"])
    sys.exit(0 if batch["status"] == "completed" else 1)


@command.command()
@click.argument("batch_id", metavar="ID")
@click.pass_obj
def status(connect: Any, /, batch_id: str) -> None:
    """Print the batch as JSON."""
    with connect() as client:
        click.echo(json.dumps(client.batch(batch_id), indent=2))


@command.command("list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.pass_obj
def list_batches(connect: Any, /, limit: int) -> None:
    """Print the newest batches: id, status, finished, failed and all lines."""
    with connect() as client:
        for batch in client.batches(limit):
            counts = batch["request_counts"]
            numbers = (counts["completed"], counts["failed"], counts["total"])
            click.echo("\t".join([batch["id"], batch["status"], *map(str, numbers)]))


@command.command()
@click.argument("batch_id", metavar="ID")
@click.pass_obj
def cancel(connect: Any, /, batch_id: str) -> None:
    """Cancel a batch; what is finished can be had as its results."""
    with connect() as client:
        click.echo(client.cancel(batch_id)["status"])


@command.command()
@click.argument("batch_id", metavar="ID")
@click.option("-o", "--output", type=_OUT, required=True, help="JSONL, or .csv or .parquet for a table.")
@click.option("--join", "table", type=_FILE, help="CSV or Parquet input whose columns to put beside the answers.")
@click.option("--id-column", default="", help="That of the input, as for submit.")
@click.pass_obj
def results(connect: Any, /, batch_id: str, output: Path, table: Path | None, id_column: str) -> None:
    """Write answers and errors of a batch that has ended."""
    with connect() as client:
        batch = client.batch(batch_id)
        if is_open(batch):
            raise click.ClickException(f"{batch_id} is {batch['status']}; there are no results yet")
        click.echo(f"{save(client, batch, output, table, id_column)} lines in {output}", err=True)


@command.command()
@click.argument("file", type=_FILE)
@_row_options
def validate(file: Path, **how: Any) -> None:
    """Check FILE as the server would, without one; print the first problems with their lines."""
    with _as_jsonl(file, how) as lines:
        count, problems, endpoint = check(lines, how["endpoint"], how["model"], BatchSettings())
    for problem in problems[:SHOWN_PROBLEMS]:
        click.echo(_problem_line(msgspec.to_builtins(problem)))
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    if problems:
        sys.exit(1)
    click.echo(f"{count} requests to {endpoint}: fine")


@command.command()
@click.argument("file", type=_FILE)
@click.option("-o", "--output", type=_OUT, required=True, help="JSONL, or .csv or .parquet for a table.")
@_row_options
@click.option("--engine-model", default="", help="Folder or hub name; the bundled demo model if not given.")
def run(file: Path, output: Path, engine_model: str, **how: Any) -> None:
    """Run FILE without a server: start engines here, answer every line, stop them again."""
    from penstock.serving.batches.local_run import Job, limits, local_run, served_name

    how["model"] = how["model"] or served_name(engine_model)
    with _as_jsonl(file, how) as lines:
        _, problems, endpoint = check(lines, how["endpoint"], served_name(engine_model), limits())
        if problems:
            for problem in problems[:SHOWN_PROBLEMS]:
                click.echo(_problem_line(msgspec.to_builtins(problem)), err=True)
            sys.exit(1)
        table = file if is_table(file) and is_table(output) else None
        sys.exit(local_run(Job(lines, endpoint, output, table, how["id_column"]), engine_model))


@contextmanager
def _as_jsonl(file: Path, how: dict[str, Any]) -> Iterator[Path]:
    """The file itself, or its rows as requests in a temporary file."""
    if not is_table(file):
        yield file
        return
    if not how["template"] or not how["model"]:
        raise click.UsageError("a CSV or Parquet file needs --template and --model")
    from penstock.serving.batches.tables import read_table

    request = RowRequest(**how | {"endpoint": how["endpoint"] or DEFAULT_ENDPOINT})
    with tempfile.NamedTemporaryFile(suffix=".jsonl", prefix=f"{file.stem}-") as lines:
        table = read_table(file)
        lines.writelines(request_lines(table.columns, table.iter_rows(named=True), request))
        lines.flush()
        yield Path(lines.name)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--metadata {text!r}: write KEY=VALUE")
    return key, value


def _print_problems(batch: dict[str, Any]) -> None:
    for problem in itertools.islice((batch["errors"] or {}).get("data", []), SHOWN_PROBLEMS):
        click.echo(_problem_line(problem), err=True)


def _problem_line(problem: dict[str, Any]) -> str:
    place = f"line {problem['line']}: " if problem["line"] else ""
    return f"{place}{problem['code']}: {problem['message']}"
