"""A batch's progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from penstock.serving.batches.client import BatchClient, Unreachable
from penstock.serving.batches.model import OPEN

POLL_S = 1.0
"""A coordinator commits once a second; asking more often shows nothing new."""
MILLION = 1_000_000


class Prices(NamedTuple):
    """What a million tokens cost, in whatever currency."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, batch: dict[str, Any]) -> float:
        """What the batch has cost so far."""
        usage = batch["usage"]
        return float(usage["input_tokens"] * self.input + usage["output_tokens"] * self.output) / MILLION


def is_open(batch: dict[str, Any]) -> bool:
    """Whether there is more to come."""
    return batch["status"] in OPEN


def watch(
    client: BatchClient, batch_id: str, console: Console, prices: Prices, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Show progress until the batch has ended; returns it. An ingress that goes away is waited for."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(batch_id, total=None, speed="")
        while True:
            try:
                batch = client.batch(batch_id)
            except Unreachable as error:
                progress.update(task, speed=str(error)[:60])
            else:
                _show(progress, task, batch, prices)
                if not is_open(batch):
                    return batch
            sleep(POLL_S)


def _show(progress: Progress, task: TaskID, batch: dict[str, Any], prices: Prices) -> None:
    counts = batch["request_counts"]
    progress.update(
        task,
        description=batch["status"],
        total=counts["total"] or None,
        completed=counts["completed"] + counts["failed"],
        speed=speed(batch, prices, time.time()),
    )


def speed(batch: dict[str, Any], prices: Prices, now: float) -> str:
    """Lines a second since it began, tokens, and cost where there are prices."""
    counts, usage = batch["request_counts"], batch["usage"]
    seconds = max(now - (batch["in_progress_at"] or now), 1.0)
    lines = (counts["completed"] + counts["failed"]) / seconds
    words = [f"{lines:.1f} lines/s", f"{usage['total_tokens']:,} tokens"]
    if counts["failed"]:
        words.append(f"{counts['failed']} failed")
    if any(prices):
        words.append(f"cost {prices.cost(batch):.4f}")
    return ", ".join(words)
