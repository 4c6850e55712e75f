"""CPU time, memory and niceness of a tree of processes, from ``/proc``."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from penstock.serving.demo.processes import Process, descendants

WATCH_S = 1.0
"""A hundred of the kernel's ticks a core."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_GROUP_OF_TITLE = (
    ("ServeReplica:penstock:prefill", "prefill engine"),
    ("ServeReplica:penstock:decode", "decode engine"),
    ("ServeReplica:penstock:mixed", "engine"),
    ("ServeReplica:default:Prefill:", "prefill server"),
    ("ServeReplica:default:Decode:", "decode server"),
    ("ServeReplica:default:OpenAiIngress", "ingress"),
    ("ProxyActor", "ingress"),
    ("dispatch", "dispatcher"),
)
"""Processes that are a group of their own within a part, with what they start; the others belong to the part's."""
_ENGINE_TITLE = "VLLM::"
_ENGINE_OF_SERVER = {"prefill server": "prefill engine", "decode server": "decode engine"}
"""vLLM's engine processes are named alike: whose engine one is, its parent tells."""


class Usage(NamedTuple):
    """One process: CPU seconds since its start, peak resident MB, nice value."""

    title: str
    group: str
    cpu_s: float
    peak_mb: float
    nice: int


Sample = dict[Process, Usage]


def sample(roots: Mapping[int, str]) -> Sample:
    """Every process at and below the roots now; ``roots`` gives the group of each."""
    found: Sample = {}
    for root, group in roots.items():
        groups: dict[int, str] = {}
        for pid in [root, *(process.pid for process in descendants(root))]:  # parents come first
            with suppress(OSError):  # it ended meanwhile
                process, usage = _read(pid, group, groups)
                found[process] = usage
                groups[pid] = usage.group
    return found


def signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    """Send a signal to all that still live."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def cpu_by_group(before: Sample, after: Sample) -> dict[str, float]:
    """CPU seconds spent between two samples."""
    spent: defaultdict[str, float] = defaultdict(float)
    for process, usage in after.items():
        spent[usage.group] += usage.cpu_s - (before[process].cpu_s if process in before else 0.0)
    return dict(spent)


def peak_by_group(usages: Iterable[Usage]) -> dict[str, float]:
    """Sum of the processes' peak resident sets, in MB; pages that processes share count in each."""
    peak: defaultdict[str, float] = defaultdict(float)
    for usage in usages:
        peak[usage.group] += usage.peak_mb
    return {group: round(mb, 1) for group, mb in peak.items()}


def busy_cores() -> float:
    """Cores in use by anybody, over the next :data:`WATCH_S`."""
    before, started = _idle_s(), time.monotonic()
    time.sleep(WATCH_S)
    seconds = time.monotonic() - started
    return max(0.0, (os.cpu_count() or 1) - (_idle_s() - before) / seconds)


def _idle_s() -> float:
    """CPU seconds that all cores together have idled since boot, waiting for disks included: see proc(5)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / _TICKS_PER_S


def _read(pid: int, part_group: str, groups: Mapping[int, str]) -> tuple[Process, Usage]:
    folder = Path(f"/proc/{pid}")
    stat = (folder / "stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()  # from the third field (state) on: see proc(5)
    title = _title((folder / "cmdline").read_bytes().decode(errors="replace").split("\0"))
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    group = _group(title, groups.get(int(fields[1]), part_group))
    usage = Usage(title, group, cpu_s, _peak_mb(folder), nice=int(fields[16]))
    return Process(pid, int(fields[19])), usage


def _group(title: str, parent_group: str) -> str:
    if title.startswith(_ENGINE_TITLE):
        return _ENGINE_OF_SERVER.get(parent_group, parent_group if "engine" in parent_group else "engine")
    return next((group for mark, group in _GROUP_OF_TITLE if mark in title), parent_group)


def _title(words: list[str]) -> str:
    """A short name: what the process calls itself, else the module, script or program it runs."""
    if "::" in words[0]:
        return words[0].strip()
    if "-m" in words:
        return words[words.index("-m") + 1]
    scripts = [word for word in words[1:] if word.endswith(".py")]
    return os.path.basename(scripts[0] if scripts else words[0])


def _peak_mb(folder: Path) -> float:
    for line in (folder / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return 0.0  # a process that is ending has no memory left
