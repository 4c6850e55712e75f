"""The pictures of the benchmark page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.figures import CPU_PREFIX, LOAD_GROUP
from tests.benchmarks.results import Result, Row, Spread

LOAD_KIND = "101/32"
"""The workloads whose concurrency varies most."""
SPLIT_AT = f"32 streams, {LOAD_KIND}"
SIZE = (7, 4)
"""Inches."""
DPI = 120


Fill = Callable[[Any, Sequence[Result]], bool]
"""Draws into matplotlib's axes; False when the results have nothing to draw."""


def draw(results: Sequence[Result], folder: Path) -> list[tuple[str, str]]:
    """Write the PNGs that there are figures for; returns their titles and file names."""
    folder.mkdir(parents=True, exist_ok=True)
    return [(title, name) for title, name, fill in _PICTURES if _picture(title, folder / name, fill, results)]


def _picture(title: str, path: Path, fill: Fill, results: Sequence[Result]) -> bool:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    if filled := fill(axes, results):
        axes.set_title(title)
        axes.legend(fontsize="small")
        figure.savefig(path)
    return filled


def _against_load(figure: str, what: str, scale: str) -> Fill:
    def fill(axes: Any, results: Sequence[Result]) -> bool:
        streams = {w.name: w.concurrency for one in results for w in one.workloads if w.name.endswith(LOAD_KIND)}
        for name, workloads in _by_contender(results).items():
            points = sorted((streams[w], rows[figure]) for w, rows in workloads.items() if w in streams)
            x, found = [at for at, _ in points], [of for _, of in points]
            spans = [[s.median - s.low for s in found], [s.high - s.median for s in found]]
            axes.errorbar(x, [s.median for s in found], yerr=spans, label=name, marker="o", capsize=3)
        ticks = sorted(set(streams.values()))
        axes.set(xlabel="streams", ylabel=what, xscale="log", yscale=scale)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        return bool(streams)

    return fill


def _cpu_split(axes: Any, results: Sequence[Result]) -> bool:
    sides = {name: rows[SPLIT_AT] for name, rows in _by_contender(results).items() if SPLIT_AT in rows}
    groups = dict.fromkeys(name for rows in sides.values() for name in rows if name.startswith(CPU_PREFIX))
    bottom = [0.0] * len(sides)
    for group in groups:
        if group not in (CPU_PREFIX + "all", CPU_PREFIX + LOAD_GROUP):
            heights = [rows[group].median if group in rows else 0.0 for rows in sides.values()]
            axes.bar(list(sides), heights, bottom=bottom, label=group.removeprefix(CPU_PREFIX))
            bottom = [base + height for base, height in zip(bottom, heights, strict=True)]
    axes.set(ylabel=f"CPU s per 1,000 tokens ({SPLIT_AT})")
    axes.tick_params("x", rotation=20)
    return bool(sides)


def _growth(part: str) -> Fill:
    def fill(axes: Any, results: Sequence[Result]) -> bool:
        scaled = [one for result in results for one in result.scale if one.part == part]
        costs = [one for one in scaled if one.figure.startswith(CPU_PREFIX)]
        for figure in dict.fromkeys(one.figure for one in costs):
            points = {int(one.at): median(one.values) for one in costs if one.figure == figure}
            axes.plot(points.keys(), points.values(), marker="o", label=figure.removeprefix(CPU_PREFIX))
        axes.set(xlabel=part, ylabel="CPU s per 1,000 tokens", xscale="log", yscale="log")
        return bool(costs)

    return fill


_PICTURES: tuple[tuple[str, str, Fill], ...] = (
    ("TTFT against load", "ttft.png", _against_load("ttft_ms_p50", "TTFT p50 (ms)", "log")),
    (
        "Tokens/s against streams",
        "throughput.png",
        _against_load("output_tokens_per_s", "output tokens/s", "linear"),
    ),
    ("Where the CPU goes", "cpu.png", _cpu_split),
    ("Cost of everything but the model against streams", "scale-streams.png", _growth("streams")),
    ("Cost of everything but the model against replicas", "scale-replicas.png", _growth("replicas")),
)


def _by_contender(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Spread]]]:
    """Figures by contender and workload, of the first pair a contender is in."""
    found: dict[str, dict[str, dict[str, Spread]]] = {}
    for comparison in (comparison for result in results for comparison in result.comparisons):
        for name, side in ((comparison.reference, "reference"), (comparison.subject, "subject")):
            if name not in found:
                found[name] = {w: _of_side(rows, side) for w, rows in comparison.workloads.items()}
    return found


def _of_side(rows: dict[str, Row], side: str) -> dict[str, Spread]:
    return {name: value for name, row in rows.items() if (value := getattr(row, side)) is not None}
