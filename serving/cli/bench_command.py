"""``penstock bench compare A B``: what moved between two benchmark results, beyond the noise of their rounds.

Results are the files that ``make bench`` writes. Two runs never see the same machine, so a figure is compared as its
ratio to the reference of the same round wherever there is one. Its noise is the exact bootstrap distribution of the
median (Efron, 1979): with the five or so rounds there are, no sampling is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from math import comb
from pathlib import Path
from statistics import median_high
from typing import NamedTuple

import click
import msgspec

CONFIDENCE = 0.99
"""High, for hundreds of figures are looked at together."""
SMALLEST_CHANGE = 0.05
"""A change that is certain but smaller is nobody's concern."""
FEWEST_ROUNDS = 4
"""Two runs of three rounds that differ by chance alone do not overlap one time in ten; of four, one time in 35."""
CPU_PREFIX = "cpu_s_per_1k:"
UNJUDGED = ("tokens_per_event", "same_answers", CPU_PREFIX + "load generator")
"""Figures that are neither good nor bad."""

Key = tuple[str, str, str]
"""Comparison, workload, figure."""


class Round(msgspec.Struct, frozen=True):
    """One contender, workload and round, as far as it is needed here."""

    reference: str
    subject: str
    contender: str
    workload: str
    number: int
    figures: dict[str, float]
    cpu: dict[str, float]

    def values(self) -> dict[str, float]:
        """All figures, CPU seconds by group among them."""
        return self.figures | {CPU_PREFIX + group: value for group, value in self.cpu.items()}


class Scaled(msgspec.Struct, frozen=True):
    """One figure of the part without a model, over its rounds."""

    part: str
    at: str
    figure: str
    values: list[float]


class BenchResult(msgspec.Struct, frozen=True):
    """What is read of a result file."""

    started: str
    rounds: list[Round] = []
    scale: list[Scaled] = []
    error: str = ""


class Change(NamedTuple):
    """One figure in B as a multiple of A: medians, and the interval that holds it with :data:`CONFIDENCE`."""

    key: Key
    relative: bool
    before: float
    after: float
    low: float
    high: float

    @property
    def factor(self) -> float:
        """B / A."""
        return self.after / self.before

    @property
    def moved(self) -> bool:
        """Beyond noise, and by enough to matter."""
        return (self.low > 1 or self.high < 1) and abs(self.factor - 1) >= SMALLEST_CHANGE

    @property
    def worse(self) -> bool:
        """A regression, if it moved."""
        more_is_better = "_per_s" in self.key[2]
        return (self.factor < 1) == more_is_better


@click.group("bench")
def command() -> None:
    pass


@command.command("compare")
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Show what did not move, too.")
@click.option("--fail", is_flag=True, help="Exit with 1 when something got worse.")
def compare_command(a: Path, b: Path, everything: bool, fail: bool) -> None:
    """What moved from result A to result B, beyond the noise of their rounds."""
    changes = compare(_read(a), _read(b))
    if not changes:
        raise click.ClickException(f"no figure with {FEWEST_ROUNDS} rounds or more is in both results")
    moved = [change for change in changes if change.moved]
    _show(changes if everything else moved)
    worse = sum(change.worse for change in moved)
    click.echo(f"{len(changes)} figures compared: {worse} worse, {len(moved) - worse} better")
    if fail and worse:
        raise SystemExit(1)


def compare(a: BenchResult, b: BenchResult) -> list[Change]:
    """Every judged figure that both results have, in the order of A."""
    before, after = samples(a), samples(b)
    changes = []
    for (key, relative), values in before.items():
        others = after.get((key, relative), [])
        if min(len(values), len(others)) >= FEWEST_ROUNDS and min(*values, *others) > 0:
            interval = ratio_interval(values, others)
            changes.append(Change(key, relative, median_high(values), median_high(others), *interval))
    return changes


def samples(result: BenchResult) -> dict[tuple[Key, bool], list[float]]:
    """Values over the rounds by key and whether they are ratios to the reference of the same round."""
    references = {_turn(r): r.values() for r in result.rounds if r.contender == r.reference}
    found: defaultdict[tuple[Key, bool], list[float]] = defaultdict(list)
    for one in result.rounds:
        if one.contender == one.reference:
            continue
        reference = references[_turn(one)]
        for figure, value in one.values().items():
            if figure not in UNJUDGED:
                base = reference.get(figure, 0.0)
                key = (f"{one.subject} / {one.reference}", one.workload, figure)
                found[key, base > 0].append(value / base if base > 0 else value)
    for scaled in result.scale:
        found[(scaled.part, scaled.at, scaled.figure), False] += scaled.values
    return dict(found)


def _turn(one: Round) -> tuple[str, str, str, int]:
    return one.reference, one.subject, one.workload, one.number


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The interval that holds median(after) / median(before) with :data:`CONFIDENCE`, both resampled."""
    ratios = sorted(
        (b / a, weight_a * weight_b)
        for a, weight_a in median_distribution(before)
        for b, weight_b in median_distribution(after)
    )
    tail = (1 - CONFIDENCE) / 2
    return _quantile(ratios, tail), _quantile(ratios, 1 - tail)


def median_distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """Each value with the probability that it is the (upper) median of a resample with replacement.

    The median is at most the k-th smallest of n values when at least n // 2 + 1 of n draws are.
    """
    count = len(values)
    needed = count // 2 + 1
    at_most = [
        sum(comb(count, m) * (k / count) ** m * (1 - k / count) ** (count - m) for m in range(needed, count + 1))
        for k in range(count + 1)
    ]
    return [(value, at_most[k + 1] - at_most[k]) for k, value in enumerate(sorted(values))]


def _quantile(weighted: Sequence[tuple[float, float]], share: float) -> float:
    reached = accumulate(weight for _, weight in weighted)
    return next((value for (value, _), total in zip(weighted, reached, strict=True) if total > share), weighted[-1][0])


def _read(path: Path) -> BenchResult:
    try:
        result = msgspec.json.decode(path.read_bytes(), type=BenchResult)
    except msgspec.DecodeError as error:
        raise click.ClickException(f"{path} is no benchmark result of this version: {error}") from error
    if result.error:
        raise click.ClickException(f"{path} is of a run that failed: {result.error}")
    return result


def _show(changes: Sequence[Change]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("what", "at", "figure", "A", "B", "B / A", f"{CONFIDENCE:.0%} interval", ""):
        table.add_column(heading, justify="right" if heading[:1] in ("A", "B", "9") else "left")
    for change in changes:
        verdict = ("[red]worse" if change.worse else "[green]better") if change.moved else ""
        spread = f"{change.low:.2f} – {change.high:.2f}"
        values = [f"{value:.3g}{'x' if change.relative else ''}" for value in (change.before, change.after)]
        table.add_row(*change.key, *values, f"{change.factor:.2f}", spread, verdict)
    if changes:
        Console().print(table)
