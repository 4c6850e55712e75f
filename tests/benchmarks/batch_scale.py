"""``python -m tests.benchmarks.batch_scale``: batches of a thousand to a million lines, and what a line costs.

One deployment of real processes (Redis, an ingress, a dispatcher, a simulated engine whose steps take no time; Kafka by
option) works on files of growing size, one after the other. Answers are short, so that what is left is what Penstock
adds to each line. CPU and memory are read from ``/proc``; what the clients of the batch see is read from Redis.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from penstock.queue.redis_client import connect
from penstock.serving.batches.client import BatchClient
from tests.benchmarks.processes import Sample, cpu_by_group, sample
from tests.benchmarks.results import machine, now, software
from tests.benchmarks.session import short_folder
from tests.support.simulated_stack import LIMITS, MODEL, Shape, SimulatedStack

RESULTS = Path("results/batch-scale")
SIZES = (1_000, 10_000, 100_000)
MAX_LINES = 1_000_000
WARM_UP = 500
"""Lines before the first measurement: imports, caches and connections are made once."""
ANSWER_TOKENS = 4
FIRST_POLL_S = 0.01
POLL_S = 0.25
TENTHS = 10
FLAT_RATE = 0.95
FLAT_MEMORY = 1.1
SETTLE_S = 3.0
"""After a batch: what it left is acknowledged, deleted and freed."""
GROUPS = {"ingress": "ingress", "dispatcher": "dispatcher", "mixed": "engine"}
BINARY = {"redis": "redis", "kafka": "kafka"}


class Measured(msgspec.Struct):
    """One file. Seconds; CPU in seconds a line by group, memory in MB by group: the peak during the batch, and its end.

    ``upload_s`` includes validation, which looks at every line; ``first_result_s`` counts from the creation of the
    batch to its first committed results. ``tenths``: lines per second in each tenth of the batch, which tells a batch
    that slows down as it grows from a machine that does.
    """

    lines: int
    upload_s: float = 0.0
    upload_cpu_s: float = 0.0
    created_s: float = 0.0
    first_result_s: float = 0.0
    seconds: float = 0.0
    lines_per_s: float = 0.0
    tenths: list[float] = []
    cpu_s_a_line: dict[str, float] = {}
    peak_mb: dict[str, float] = {}
    end_mb: dict[str, float] = {}


class Report(msgspec.Struct):
    """A run, as it is in JSON."""

    started: str
    queue: str
    machine: dict[str, Any]
    software: dict[str, str]
    settings: dict[str, str]
    sizes: list[Measured] = []

    def write(self, folder: Path) -> Path:
        """Write ``folder/<start>.json``; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.started.replace(':', '')}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        return path


class Bench:
    """Measures file after file on a stack that is up."""

    def __init__(self, stack: SimulatedStack, folder: Path, profile: Path | None) -> None:
        self._stack = stack
        self._folder = folder
        self._profile = profile
        self._roots = {part.pid: GROUPS[part.kind] for part in stack.parts.values()}
        self._roots |= {cast("Any", stack.redis.process).pid: "redis"}
        self._roots |= {cast("Any", stack.kafka).process.pid: "kafka"} if stack.kafka is not None else {}

    def run(self, lines: int, progress: Progress) -> Measured:
        """Upload a file of so many lines, and wait until its batch has completed."""
        path, found = write_input(self._folder, lines), Measured(lines)
        with BatchClient(self._stack.urls[0], "") as api, connect(self._stack.redis_settings) as store:
            before, started = sample(self._roots), time.monotonic()
            uploaded = api.upload(path)
            found.upload_s = time.monotonic() - started
            found.upload_cpu_s = cpu_by_group(before, sample(self._roots))["ingress"] / lines
            path.unlink()
            self._forget_peaks()
            before, started = sample(self._roots), time.monotonic()
            batch = api.create(uploaded["id"], "/v1/chat/completions", "24h", {})
            found.created_s = time.monotonic() - started
            with self._profiled():
                self._watch(store, batch["id"], found, started, progress)
            after = sample(self._roots)
            ended = api.batch(batch["id"])
            assert ended["request_counts"] == {"total": lines, "completed": lines, "failed": 0}, ended
        self._enter(found, before, after)
        time.sleep(SETTLE_S)
        found.end_mb = self._resident()
        return found

    def _watch(self, store: redis.Redis, batch_id: str, found: Measured, started: float, progress: Progress) -> None:
        key = f"{self._stack.redis_settings.namespace}batch:{batch_id}"
        task, done = progress.add_task(f"{found.lines:,} lines", total=found.lines), 0
        at, counted = started, 0
        while True:
            status, completed = cast("list[bytes | None]", store.hmget(key, "status", "completed"))
            done = int(completed or 0)
            progress.update(task, completed=done)
            if done - counted >= found.lines / TENTHS:
                found.tenths.append((done - counted) / (time.monotonic() - at))
                at, counted = time.monotonic(), done
            found.first_result_s = found.first_result_s or (time.monotonic() - started if done else 0.0)
            if status not in (b"validating", b"in_progress", b"finalizing"):
                break
            self._stack.assert_alive()
            time.sleep(POLL_S if done else FIRST_POLL_S)
        found.seconds = time.monotonic() - started
        found.lines_per_s = found.lines / found.seconds
        assert status == b"completed", f"{batch_id}: {status!r}"

    def _enter(self, found: Measured, before: Sample, after: Sample) -> None:
        spent = cpu_by_group(before, after)
        found.cpu_s_a_line = {group: seconds / found.lines for group, seconds in spent.items()}
        found.peak_mb = {group: round(_status_mb(pid, "VmHWM"), 1) for pid, group in self._living()}

    def _living(self) -> Iterator[tuple[int, str]]:
        """The processes themselves: some are started by a wrapper that stays."""
        for process, usage in sample(self._roots).items():
            if usage.peak_mb > 0:
                yield process.pid, usage.group

    def _resident(self) -> dict[str, float]:
        return {group: round(_status_mb(pid, "VmRSS"), 1) for pid, group in self._living()}

    def _forget_peaks(self) -> None:
        for pid, _ in self._living():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # peak resident size starts again: see proc(5)

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Record what the ingress does, in py-spy's format for speedscope."""
        if self._profile is None:
            yield
            return
        ingress = next(pid for pid, group in self._living() if group == "ingress")
        words = [
            str(Path(sys.executable).with_name("py-spy")),
            "record",
            "--format",
            "raw",
            "--rate",
            "50",
            "--pid",
            str(ingress),
        ]
        command = [*words, "--output", str(self._profile)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as recording:
            try:
                yield
            finally:
                recording.send_signal(2)


def write_input(folder: Path, lines: int) -> Path:
    """A file of so many short chats."""
    path = folder / f"{lines}.jsonl"
    with path.open("w") as file:
        for number in range(lines):
            body = {
                "model": MODEL,
                "max_tokens": ANSWER_TOKENS,
                "messages": [{"role": "user", "content": f"What is {number} and {number % 97}?"}],
            }
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def table(report: Report) -> Table:
    """One column a size."""
    shown = Table(title=f"batches on {report.queue}", title_justify="left")
    shown.add_column("")
    for found in report.sizes:
        shown.add_column(f"{found.lines:,} lines", justify="right")

    def row(name: str, values: list[float], form: str) -> None:
        shown.add_row(name, *(format(value, form) for value in values))

    sizes = report.sizes
    row("lines/s", [found.lines_per_s for found in sizes], ",.0f")
    row("lines/s, slowest tenth", [min(found.tenths, default=0.0) for found in sizes], ",.0f")
    row("lines/s, last tenth", [found.tenths[-1] if found.tenths else 0.0 for found in sizes], ",.0f")
    row("creation to first results (s)", [found.first_result_s for found in sizes], ".2f")
    row("upload with validation (s)", [found.upload_s for found in sizes], ".2f")
    row("CPU of a line's upload (µs)", [found.upload_cpu_s * 1e6 for found in sizes], ".1f")
    for group in sizes[0].cpu_s_a_line:
        row(f"CPU of a line: {group} (ms)", [found.cpu_s_a_line[group] * 1000 for found in sizes], ".3f")
    for group in sizes[0].peak_mb:
        row(f"memory: {group}, peak (MB)", [found.peak_mb[group] for found in sizes], ",.0f")
        row(f"memory: {group}, end (MB)", [found.end_mb[group] for found in sizes], ",.0f")
    return shown


def flatness(first: Measured, last: Measured) -> str:
    """How the largest file compares with the smallest, and whether that is flat."""
    rate, first_result = last.lines_per_s / first.lines_per_s, last.first_result_s / first.first_result_s
    grown = {group: last.peak_mb[group] / first.peak_mb[group] for group in first.peak_mb}
    memory = ", ".join(f"{group} {ratio:.2f}" for group, ratio in grown.items())
    return (
        f"{last.lines:,} lines against {first.lines:,}: lines/s {rate:.2f} (wanted: at least {FLAT_RATE}); "
        f"peak memory {memory} (at most {FLAT_MEMORY}); first results {first_result:.2f}"
    )


def _status_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    return 0.0


@click.command()
@click.option("--lines", default=",".join(map(str, SIZES)), show_default=True, help="Sizes, comma-separated.")
@click.option("--queue", type=click.Choice(["redis", "kafka"]), default="redis", show_default=True)
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Environment of all parts.")
@click.option("--profile", type=click.Path(path_type=Path), help="Record the ingress with py-spy (raw stacks).")
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(lines: str, queue: str, changes: tuple[str, ...], profile: Path | None, results: Path) -> None:
    """Measure batches of growing size; prints a table and writes it as JSON."""
    sizes = [int(size) for size in lines.replace("_", "").split(",")]
    console = Console() if sys.stdout.isatty() else Console(width=120)
    settings = dict(change.split("=", 1) for change in changes)
    report = Report(now(), queue, machine(), software(), settings)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with short_folder(results / "logs" / report.started.replace(":", "")) as folder:
        fixed = {
            "PENSTOCK_FILES_ROOT": str(folder / "files"),
            "PENSTOCK_FILES_MAX_UPLOAD_BYTES": str(2**30),
            "PENSTOCK_BATCHES_MAX_LINES": str(MAX_LINES),
        }
        shape = Shape(
            prefill=0, decode=0, mixed=1, dispatchers=1, ingresses=1, queue=queue, profile="instant",
            limits=LIMITS | {"max_num_seqs": 256, "num_gpu_blocks_override": 16_384},
            settings=fixed | settings,
        )  # fmt: skip
        with (
            console.status("starting"),
            SimulatedStack(folder, shape) as stack,
            Progress(*bar, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress,
        ):
            Bench(stack, folder, None).run(WARM_UP, progress)
            for size in sizes:
                bench = Bench(stack, folder, profile if size == sizes[-1] else None)
                report.sizes.append(bench.run(size, progress))
                console.print(f"{size:,} lines: {report.sizes[-1].lines_per_s:,.0f} lines/s", highlight=False)
    console.print(table(report))
    by_size = sorted(report.sizes, key=lambda found: found.lines)
    console.print(flatness(by_size[0], by_size[-1]), highlight=False)
    console.print(str(report.write(results)), highlight=False)


if __name__ == "__main__":
    main()
