"""What was measured as Markdown, written into its place on the benchmark page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.figures import CPU_PREFIX, LOAD_GROUP, spread
from tests.benchmarks.goals import Standing, standings
from tests.benchmarks.report import label, number
from tests.benchmarks.results import Comparison, Result, Row, Scaled, Sheet, Spread

BEGIN = "<!-- measured: written by `python -m tests.benchmarks report` -->"
END = "<!-- end of what was measured -->"
PERCENTILES = ("p50", "p95", "p99")
_TABLES = (
    ("output tokens/s", ("output_tokens_per_s",)),
    ("requests/s", ("requests_per_s",)),
    ("TTFT p50 / p95 / p99 (ms)", tuple(f"ttft_ms_{p}" for p in PERCENTILES)),
    ("ITL p50 / p95 / p99 (ms)", tuple(f"itl_ms_{p}" for p in PERCENTILES)),
    ("first to second token p50 (ms)", ("second_token_gap_ms_p50",)),
    ("end to end p50 / p95 / p99 (ms)", tuple(f"e2e_ms_{p}" for p in PERCENTILES)),
    ("CPU s per 1,000 tokens", (CPU_PREFIX + "all",)),
    ("tokens per event", ("tokens_per_event",)),
)


class PageError(RuntimeError):
    """The page has no place for what was measured."""


def write_into(page: Path, text: str) -> None:
    """Replace what is between the page's two marks. Raises :class:`PageError` when they are not there."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise PageError(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")


def markdown(results: Sequence[Result], plots: Sequence[tuple[str, str]] = ()) -> str:
    """All tables of these runs; ``plots`` are titles and addresses of pictures that come first."""
    parts = [_goals(reached)] if (reached := standings(results)) else []
    parts += [f"![{title}]({address})" for title, address in plots]
    return "\n\n".join(parts + [part for result in results for part in _run(result)]) + "\n"


def _run(result: Result) -> list[str]:
    parts = [f"## {'Everything but the model' if result.scale else 'Contenders'}", _preface(result)]
    parts += [f"Skipped: {what}." for what in result.skipped]
    for comparison in result.comparisons:
        parts += [f"### {comparison.name}", *_comparison(comparison)]
    if result.contenders:
        parts += ["### Start, memory, idle", _sheets(result.contenders)]
    return parts + _scale(result.scale)


def _goals(reached: Sequence[Standing]) -> str:
    body = [[one.what, one.wanted, one.measured if one.met else f"**{one.measured}**"] for one in reached]
    return _table(["goal (missed: bold)", "wanted", "measured"], body)


def _preface(result: Result) -> str:
    machine, settings = result.machine, result.settings
    versions = ", ".join(f"{name} {number}" for name, number in result.software.items())
    model = f" Model {settings['model']}, dtype {settings['dtype']}." if "model" in settings else ""
    return (
        f"Measured {result.started} in {result.seconds / 60:.0f} minutes on {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB "
        f"(load average before: {machine['load_average_before']}); {versions}.{model} "
        f"Medians of {settings['rounds']} rounds; ratios are of the same round, with their lowest and highest."
    )


def _comparison(comparison: Comparison) -> list[str]:
    tables = [_figures(comparison, title, names) for title, names in _TABLES]
    return tables + [_split(comparison, side) for side in ("reference", "subject")]


def _figures(comparison: Comparison, title: str, names: Sequence[str]) -> str:
    body = []
    for workload, rows in comparison.workloads.items():
        shown = [rows[name] for name in names]
        cells = [" / ".join(number(getattr(row, side)) for row in shown) for side in ("reference", "subject", "ratio")]
        body.append([workload, *cells, _range(shown[0].ratio)])
    lowest = "low – high" if len(names) == 1 else "low – high (p50)"
    return _table([title, comparison.reference, comparison.subject, "ratio", lowest], body)


def _split(comparison: Comparison, side: str) -> str:
    """Where the CPU goes: a row a workload, a column a group of processes."""
    groups = dict.fromkeys(
        name.removeprefix(CPU_PREFIX)
        for rows in comparison.workloads.values()
        for name, row in rows.items()
        if name.startswith(CPU_PREFIX) and getattr(row, side) is not None
    )
    columns = [group for group in groups if group not in ("all", LOAD_GROUP)] + ["all", LOAD_GROUP]
    body = [
        [workload, *(number(_side(rows, CPU_PREFIX + group, side)) for group in columns)]
        for workload, rows in comparison.workloads.items()
    ]
    return _table([f"CPU s per 1,000 tokens: {getattr(comparison, side)}", *columns], body)


def _side(rows: Mapping[str, Row], name: str, side: str) -> Spread | None:
    found: Spread | None = getattr(rows[name], side) if name in rows else None
    return found


def _sheets(contenders: Mapping[str, Sheet]) -> str:
    columns = [_sheet(sheet) for sheet in contenders.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return _table(["", *contenders], [[name, *(column.get(name, "–") for column in columns)] for name in sorted(names)])


def _sheet(sheet: Sheet) -> dict[str, str]:
    cores: defaultdict[str, float] = defaultdict(float)
    for process in sheet.idle:
        cores[process.group] += process.cores
    rows = {f"ready: {part} (s)": f"{seconds:.1f}" for part, seconds in sheet.ready_s.items()}
    rows |= {f"peak RSS: {group} (MB)": f"{mb:,.0f}" for group, mb in sheet.peak_rss_mb.items()}
    rows["peak RSS: all (MB)"] = f"{sum(sheet.peak_rss_mb.values()):,.0f}"
    rows |= {f"idle: {group} (cores)": f"{used:.3f}" for group, used in cores.items()}
    rows["idle: all (cores)"] = f"{sum(cores.values()):.3f}"
    rows["processes left behind"] = str(len(sheet.left_behind))
    return rows


def _scale(scale: Sequence[Scaled]) -> list[str]:
    """A table a part: a row a place, a column a figure."""
    tables = []
    for part in dict.fromkeys(one.part for one in scale):
        of_part = [one for one in scale if one.part == part]
        figures = list(dict.fromkeys(one.figure for one in of_part))
        cells = {(one.at, one.figure): number(spread(one.values)) for one in of_part}
        places = dict.fromkeys(one.at for one in of_part)
        body = [[at, *(cells.get((at, figure), "–") for figure in figures)] for at in places]
        tables.append(_table([part, *(label(figure) for figure in figures)], body))
    return tables


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def _range(found: Spread | None) -> str:
    return f"{found.low:.2f} – {found.high:.2f}" if found else "–"
