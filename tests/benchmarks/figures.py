"""From what was measured to figures, and from figures to ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tests.benchmarks.load import Measured
from tests.benchmarks.results import Comparison, Result, Round, Row, Spread
from tests.benchmarks.workloads import Workload

PERCENTILES = (50, 95, 99)
CPU_PREFIX = "cpu_s_per_1k:"
LOAD_GROUP = "load generator"
"""Group of the load generator's own CPU time, which is no cost of the contender."""

LONG_PROMPT = 1000
"""Tokens of a prompt whose prefill is a good part of a request's work."""
ENGINE_SHARE = 0.1
"""Of the engines' CPU with such prompts; a prefill engine takes half of it, one that is passed by a hundredth."""


class RoundError(RuntimeError):
    """A contender did not do what was asked of it; its figures would mean nothing."""


def check(contender: str, workload: Workload, measured: Measured) -> None:
    """Every request answered, with exactly the tokens asked for. Raises :class:`RoundError`."""
    faults = {
        f"{workload.requests - measured.completed} of {workload.requests} requests failed": (
            measured.completed != workload.requests
        ),
        f"errors: {measured.errors[:3]}": bool(measured.errors),
        f"output tokens: {_difference(measured.output_lens, workload.output_lens)}": (
            measured.output_lens != workload.output_lens
        ),
        f"prompt tokens: {_difference(measured.input_lens, workload.prompt_lens)}": (
            measured.input_lens != workload.prompt_lens
        ),
        "every answer came in one event: it was not streamed": not any(measured.itls),
    }
    if found := [fault for fault, present in faults.items() if present]:
        raise RoundError(f"{contender}, {workload.name}: " + "; ".join(found))


def check_worked(contender: str, workload: Workload, cpu_s: dict[str, float], groups: Iterable[str]) -> None:
    """Every part that is said to do the work used CPU for it. Raises :class:`RoundError`.

    A queue that nothing goes through would otherwise show as a fast contender. Engines that idle use some CPU, too:
    with long prompts, which cost either engine of a pair much, each must have its share.
    """
    engines = sum(cpu for group, cpu in cpu_s.items() if group.endswith("engine"))
    least = ENGINE_SHARE * engines if workload.prompt_tokens >= LONG_PROMPT else 0.0
    idle = [name for name in groups if cpu_s.get(name, 0.0) <= (least if name.endswith("engine") else 0.0)]
    if idle:
        raise RoundError(f"{contender}, {workload.name}: these parts did next to nothing: {', '.join(idle)}")


def _difference(found: Sequence[int], wanted: Sequence[int]) -> str:
    wrong = [(a, b) for a, b in zip(found, wanted, strict=False) if a != b]
    return f"{len(wrong)} of {len(wanted)} wrong, such as {wrong[0][0]} for {wrong[0][1]}" if wrong else "some missing"


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


def summarise(result: Result) -> list[Comparison]:
    """Both sides and their ratio by pair, workload and figure (CPU: ``cpu_s_per_1k:<group>``)."""
    pairs = dict.fromkeys((r.reference, r.subject) for r in result.rounds)
    return [
        Comparison(*pair, {w.name: rows for w in result.workloads if (rows := _rows(result, *pair, w.name))})
        for pair in pairs
    ]


def _rows(result: Result, reference: str, subject: str, workload: str) -> dict[str, Row]:
    sides = [
        [
            _all_figures(r)
            for r in result.rounds
            if (r.reference, r.subject, r.contender, r.workload) == (reference, subject, contender, workload)
        ]
        for contender in (reference, subject)
    ]
    names = dict.fromkeys(name for side in sides for values in side for name in values)
    return {name: _row(*([values.get(name) for values in side] for side in sides)) for name in names}


def _all_figures(one: Round) -> dict[str, float]:
    return one.figures | {CPU_PREFIX + group: value for group, value in one.cpu.items()}


def _row(reference: Sequence[float | None], subject: Sequence[float | None]) -> Row:
    ratios = [b / a for a, b in zip(reference, subject, strict=True) if a and b is not None]
    return Row(spread(reference), spread(subject), spread(ratios))


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, smallest and largest; None of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    summaries: tuple[Callable[..., float], ...] = (np.median, np.min, np.max)
    return Spread(*(float(summary(known)) for summary in summaries))


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(seconds, PERCENTILES) * 1000
    return {f"{name}_p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
