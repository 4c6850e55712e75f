"""What Penstock wants to reach, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from tests.benchmarks.figures import CPU_PREFIX
from tests.benchmarks.results import Result, Row

Rows = dict[str, Row]
"""Rows of one pair and workload, by figure."""
PATH_GROUPS = ("ingress", "kafka", "redis", "dispatcher")
"""Everything between client and engine."""


class Goal(NamedTuple):
    """A limit on a value that one pair's rows of one workload give; ``at_least`` or at most."""

    what: str
    reference: str
    subject: str
    workload: str
    value: Callable[[Rows], float | None]
    limit: float
    at_least: bool
    unit: str


class Standing(NamedTuple):
    """A goal and what was measured, in words."""

    what: str
    wanted: str
    measured: str
    met: bool


def ratio(figure: str) -> Callable[[Rows], float | None]:
    """Median over the rounds of subject / reference."""

    def value(rows: Rows) -> float | None:
        found = rows[figure].ratio if figure in rows else None
        return found.median if found else None

    return value


def difference(figure: str) -> Callable[[Rows], float | None]:
    """Subject's median less reference's."""

    def value(rows: Rows) -> float | None:
        row = rows.get(figure)
        return row.subject.median - row.reference.median if row and row.subject and row.reference else None

    return value


def path_share(rows: Rows) -> float | None:
    """Share of the subject's CPU that :data:`PATH_GROUPS` use."""
    spent = {group: rows[CPU_PREFIX + group].subject for group in (*PATH_GROUPS, "all") if CPU_PREFIX + group in rows}
    everything = spent.pop("all", None)
    return sum(of.median for of in spent.values() if of) / everything.median if everything else None


GOALS = (
    Goal("tokens/s", "ray-serve-llm", "pd-kafka", "32 streams, 101/32", ratio("output_tokens_per_s"), 5.0, True, "x"),
    Goal("TTFT p95", "ray-serve-llm", "pd-kafka", "32 streams, 101/32", ratio("ttft_ms_p95"), 0.25, False, "x"),
    Goal("tokens/s", "vllm", "mixed-redis", "32 streams, 101/32", ratio("output_tokens_per_s"), 1.0, True, "x"),
    Goal("tokens/s", "vllm", "mixed-redis", "128 streams, 101/32", ratio("output_tokens_per_s"), 1.0, True, "x"),
    Goal("more TTFT p50", "vllm", "mixed-redis", "1 stream, 101/32", difference("ttft_ms_p50"), 5.0, False, " ms"),
    Goal("TTFT p50", "vllm", "mixed-redis", "1 stream, 1500/32", ratio("ttft_ms_p50"), 1.10, False, "x"),
    Goal("share of CPU in the path", "vllm", "pd-kafka", "32 streams, 101/32", path_share, 0.20, False, ""),
)
TOKEN_PATH_GOAL = 20.0
"""Tokens per core of the token path, as a multiple of Ray Serve's response streaming."""


def standings(results: Sequence[Result]) -> list[Standing]:
    """Every goal that there are figures for."""
    pairs = {(c.reference, c.subject): c.workloads for result in results for c in result.comparisons}
    found = []
    for goal in GOALS:
        rows = pairs.get((goal.reference, goal.subject), {}).get(goal.workload)
        value = goal.value(rows) if rows else None
        if value is not None:
            what = f"{goal.subject} / {goal.reference}, {goal.workload}: {goal.what}"
            found.append(_standing(what, value, goal.limit, goal.at_least, goal.unit))
    path = [one for result in results for one in result.scale if one.at == "penstock / ray serve"]
    found += [
        _standing("token path / Ray Serve's streaming, per core", median(one.values), TOKEN_PATH_GOAL, True, "x")
        for one in path
    ]
    return found


def _standing(what: str, value: float, limit: float, at_least: bool, unit: str) -> Standing:
    met = value >= limit if at_least else value <= limit
    return Standing(what, f"{'at least' if at_least else 'at most'} {limit:g}{unit}", f"{value:.3g}{unit}", met)
