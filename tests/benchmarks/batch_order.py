"""``python -m tests.benchmarks.batch_order``: one file in its own order and in that of its prompts, and what the prefix
cache makes of each.

The lines share a few long system prompts and come shuffled, as from a data set. The KV cache holds a third of the
system prompts: enough for those that are in use when lines come sorted, too little for all of them.
"""

from __future__ import annotations

import json
import random
import string
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
from rich.console import Console
from rich.table import Table

from penstock.serving.batches.client import BatchClient
from penstock.serving.batches.settings import BatchSettings
from tests.benchmarks.results import machine, now, software
from tests.benchmarks.session import short_folder
from tests.support.simulated_stack import MODEL, Shape, SimulatedStack
from tests.support.waiting import eventually

RESULTS = Path("results/batch-order")
ANSWER_TOKENS = 4
BLOCK_TOKENS = 32
"""What vLLM's attention takes on processors."""
ORDERS = {"of the file": 1, "of the prompts": BatchSettings().look_ahead_lines}
"""By how many lines are put in order at a time; one line is in order by itself."""
BATCH_TIMEOUT_S = 1800.0
"""Ten times what 1,500 lines take on a real engine and two busy cores."""


class Ordered(msgspec.Struct):
    """One order. ``cached_share``: of all prompt tokens, those whose KV was in the cache."""

    order: str
    prompt_tokens: int
    cached_share: float
    lines_per_s: float


class Report(msgspec.Struct):
    """A run, as it is in JSON."""

    started: str
    machine: dict[str, Any]
    software: dict[str, str]
    settings: dict[str, Any]
    orders: list[Ordered]


class Input(NamedTuple):
    """What the file is made of."""

    lines: int
    prompts: int
    words: int
    seed: int

    def write(self, path: Path) -> Path:
        """So many chats, each with one of the system prompts and a question of its own."""
        rng = random.Random(self.seed)
        systems = [" ".join(_word(rng) for _ in range(self.words)) for _ in range(self.prompts)]
        order = [number % self.prompts for number in range(self.lines)]
        rng.shuffle(order)
        path.write_text("".join(_line(number, systems[which]) for number, which in enumerate(order)))
        return path


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=3))


def _line(number: int, system: str) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Number {number}?"}]
    body = {"model": MODEL, "max_tokens": ANSWER_TOKENS, "messages": messages}
    line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


def measure(folder: Path, engine: str, kv_tokens: int, order: str, asked: Input) -> Ordered:
    """Run the file on a deployment of its own, whose caches are empty."""
    limits = {
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": kv_tokens // BLOCK_TOKENS,
        "block_size": BLOCK_TOKENS,
    }
    settings = {
        "PENSTOCK_FILES_ROOT": str(folder / "files"),
        "PENSTOCK_MODEL_ENGINE_ARGS": json.dumps(limits),
        "PENSTOCK_BATCHES_LOOK_AHEAD_LINES": str(ORDERS[order]),
    }
    shape = Shape(
        prefill=0, decode=0, mixed=1, dispatchers=1, ingresses=1, engine=engine, limits=limits, settings=settings
    )
    folder.mkdir()
    with SimulatedStack(folder, shape) as stack, BatchClient(stack.urls[0], "") as api:
        uploaded = api.upload(asked.write(folder / "in.jsonl"))
        started = time.monotonic()
        batch = api.create(uploaded["id"], "/v1/chat/completions", "24h", {})["id"]
        eventually(lambda: api.batch(batch)["status"] == "completed", BATCH_TIMEOUT_S, "the batch completes", 0.25)
        seconds = time.monotonic() - started
        ended = api.batch(batch)
    assert ended["request_counts"]["completed"] == asked.lines, ended
    tokens = ended["usage"]["input_tokens"]
    cached = ended["usage"]["input_tokens_details"]["cached_tokens"]
    return Ordered(order, tokens, cached / tokens, asked.lines / seconds)


def table(report: Report) -> Table:
    """One row an order."""
    shown = Table("order", "prompt tokens", "of them cached", "lines/s", title="batch in order", title_justify="left")
    for found in report.orders:
        shown.add_row(found.order, f"{found.prompt_tokens:,}", f"{found.cached_share:.1%}", f"{found.lines_per_s:,.1f}")
    return shown


@click.command()
@click.option("--lines", default=1500, show_default=True)
@click.option("--prompts", default=60, show_default=True, help="System prompts, evenly spread over the lines.")
@click.option("--words", default=250, show_default=True, help="Random words of a system prompt, of three tokens or so.")
@click.option("--kv-tokens", default=16_000, show_default=True, help="Size of the engine's KV cache.")
@click.option("--engine", type=click.Choice(["simulated", "vllm"]), default="vllm", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(lines: int, prompts: int, words: int, kv_tokens: int, engine: str, seed: int, results: Path) -> None:
    """The same file in both orders, one after the other; prints a table and writes it as JSON."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    asked = Input(lines, prompts, words, seed)
    settings = asked._asdict() | {"kv_tokens": kv_tokens, "engine": engine}
    report = Report(now(), machine(), software(), settings, [])
    name = report.started.replace(":", "")
    with short_folder(results / "logs" / name) as folder:
        for number, order in enumerate(ORDERS):
            with console.status(f"lines in the order {order}"):
                report.orders.append(measure(folder / str(number), engine, kv_tokens, order, asked))
    console.print(table(report))
    path = results / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    console.print(str(path), highlight=False)


if __name__ == "__main__":
    main()
