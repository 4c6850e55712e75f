"""From what was measured to figures, and from figures to ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tests.benchmarks.load import Measured
from tests.benchmarks.results import ALONE, Result, Round, Row, Spread
from tests.benchmarks.workloads import Workload

PERCENTILES = (50, 95, 99)
CPU_PREFIX = "cpu_s_per_1k:"
LOAD_GROUP = "load generator"
"""Group of the load generator's own CPU time, which is no cost of the contender."""


class RoundError(RuntimeError):
    """A contender did not do what was asked of it; its figures would mean nothing."""


def check(contender: str, workload: Workload, measured: Measured) -> None:
    """Every request answered, with exactly the tokens asked for. Raises :class:`RoundError`."""
    faults = {
        f"{workload.requests - measured.completed} of {workload.requests} requests failed": (
            measured.completed != workload.requests
        ),
        f"errors: {measured.errors[:3]}": bool(measured.errors),
        f"output tokens {sorted(set(measured.output_lens))}, not {workload.output_tokens}": (
            set(measured.output_lens) != {workload.output_tokens}
        ),
        f"prompt tokens {sorted(set(measured.input_lens))}, not {workload.prompt_tokens}": (
            set(measured.input_lens) != {workload.prompt_tokens}
        ),
        "every answer came in one event: it was not streamed": not any(measured.itls),
    }
    if found := [fault for fault, present in faults.items() if present]:
        raise RoundError(f"{contender}, {workload.name}: " + "; ".join(found))


def figures(measured: Measured) -> dict[str, float]:
    """Throughput per second, latencies in milliseconds."""
    tokens = sum(measured.output_lens)
    events = sum(1 + len(gaps) for gaps in measured.itls)
    return {
        "output_tokens_per_s": tokens / measured.duration_s,
        "requests_per_s": measured.completed / measured.duration_s,
        **_percentiles("ttft_ms", measured.ttfts),
        **_percentiles("itl_ms", [gap for gaps in measured.itls for gap in gaps]),
        **_percentiles("second_token_gap_ms", [gaps[0] for gaps in measured.itls if gaps]),
        **_percentiles("e2e_ms", measured.latencies),
        "tokens_per_event": tokens / events,
    }


def per_thousand_tokens(cpu_s: dict[str, float], measured: Measured) -> dict[str, float]:
    """CPU seconds per 1,000 output tokens by group, with the load generator and ``all`` but it."""
    thousands = sum(measured.output_lens) / 1000
    groups = cpu_s | {"all": sum(cpu_s.values()), LOAD_GROUP: measured.cpu_s}
    return {group: seconds / thousands for group, seconds in groups.items()}


def same_answers(one: Measured, other: Measured) -> float:
    """Share of requests that both answered with the same text."""
    return float(np.mean([a == b for a, b in zip(one.answers, other.answers, strict=True)]))


def summarise(result: Result) -> dict[str, dict[str, dict[str, Row]]]:
    """Both sides and their ratio by comparison, workload and figure (CPU: ``cpu_s_per_1k:<group>``)."""
    comparisons = dict.fromkeys(r.comparison for r in result.rounds if r.comparison != ALONE)
    return {
        name: {workload.name: _rows(result, name, workload.name) for workload in result.workloads}
        for name in comparisons
    }


def _rows(result: Result, comparison: str, workload: str) -> dict[str, Row]:
    sides = [
        [
            _all_figures(r)
            for r in result.rounds
            if (r.comparison, r.contender, r.workload) == (side, contender, workload)
        ]
        for side, contender in (
            (ALONE, result.reference),
            (comparison, result.reference),
            (comparison, comparison),
        )
    ]
    names = dict.fromkeys(name for side in sides for values in side for name in values)
    return {name: _row(*([values.get(name) for values in side] for side in sides)) for name in names}


def _all_figures(one: Round) -> dict[str, float]:
    return one.figures | {CPU_PREFIX + group: value for group, value in one.cpu.items()}


def _row(alone: Sequence[float | None], reference: Sequence[float | None], subject: Sequence[float | None]) -> Row:
    ratios = [b / a for a, b in zip(reference, subject, strict=True) if a and b is not None]
    return Row(_spread(alone), _spread(reference), _spread(subject), _spread(ratios))


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    summaries: tuple[Callable[..., float], ...] = (np.median, np.min, np.max)
    return Spread(*(float(summary(known)) for summary in summaries))


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(seconds, PERCENTILES) * 1000
    return {f"{name}_p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
