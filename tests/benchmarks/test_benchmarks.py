"""What decides whether a figure may be believed: checks, arithmetic, the process table, the result file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.benchmarks.figures import RoundError, check, figures, per_thousand_tokens, summarise
from tests.benchmarks.load import Measured
from tests.benchmarks.processes import cpu_by_group, sample
from tests.benchmarks.report import markdown, tables
from tests.benchmarks.results import ALONE, LATEST, IdleProcess, Result, Round, Sheet, read
from tests.benchmarks.workloads import Workload

pytestmark = pytest.mark.unit

WORKLOAD = Workload("two", concurrency=1, prompt_tokens=5, output_tokens=3, requests=2)
GOOD = Measured(
    duration_s=2.0,
    completed=2,
    input_lens=[5, 5],
    output_lens=[3, 3],
    ttfts=[0.010, 0.030],
    itls=[[0.004, 0.002], [0.006, 0.002]],
    latencies=[0.1, 0.2],
    errors=[],
    answers=["a", "b"],
    cpu_s=0.3,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"completed": 1}, "1 of 2 requests failed"),
        ({"errors": ["Bad Gateway"]}, "Bad Gateway"),
        ({"output_lens": [3, 2]}, r"output tokens \[2, 3\], not 3"),
        ({"input_lens": [5, 6]}, r"prompt tokens \[5, 6\], not 5"),
        ({"itls": [[], []]}, "not streamed"),
    ],
)
def test_a_round_that_went_wrong_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(RoundError, match=words):
        check("mixed-redis", WORKLOAD, msgspec.structs.replace(GOOD, **change))


def test_a_good_round_passes() -> None:
    check("mixed-redis", WORKLOAD, GOOD)


def test_an_answer_in_one_event_has_no_gap() -> None:
    """A busy server may send all tokens of an answer at once; the others still tell the gaps."""
    merged = msgspec.structs.replace(GOOD, itls=[[], [0.006, 0.002]])
    check("vllm", WORKLOAD, merged)
    assert figures(merged)["second_token_gap_ms_p50"] == pytest.approx(6.0)
    assert figures(merged)["tokens_per_event"] == pytest.approx(1.5)


def test_figures_are_per_second_and_in_milliseconds() -> None:
    found = figures(GOOD)
    assert found["output_tokens_per_s"] == pytest.approx(3.0)
    assert found["requests_per_s"] == pytest.approx(1.0)
    assert found["ttft_ms_p50"] == pytest.approx(20.0)
    assert found["second_token_gap_ms_p50"] == pytest.approx(5.0)
    assert found["itl_ms_p50"] == pytest.approx(3.0)
    assert found["tokens_per_event"] == pytest.approx(1.0)


def test_the_load_generator_is_no_cost_of_the_contender() -> None:
    cpu = per_thousand_tokens({"engine": 0.06, "ingress": 0.03}, GOOD)
    assert cpu == pytest.approx({"engine": 10.0, "ingress": 5.0, "all": 15.0, "load generator": 50.0})


def _result() -> Result:
    result = Result(
        started="2026-01-02T03:04:05Z",
        machine={"cpu": "c", "cores": 2, "memory_gib": 8.0, "load_average_before": 0.1},
        software={"ray": "1"},
        settings={"rounds": 2, "model": "m", "dtype": "auto"},
        reference="vllm",
        workloads=[WORKLOAD],
        contenders={"vllm": Sheet({"all": 1.0}, {"engine": 5.0}, [IdleProcess("p", "engine", 0.25, 0)])},
    )
    alone = dict.fromkeys(figures(GOOD), 110.0)
    result.rounds.append(Round(ALONE, "vllm", WORKLOAD.name, 0, alone, {"api server": 110.0}))
    for number, (reference, subject) in enumerate([(100.0, 50.0), (10.0, 20.0)]):
        for name, value, group in (("vllm", reference, "api server"), ("pd-kafka", subject, "ingress")):
            values = dict.fromkeys(figures(GOOD), value)
            cpu = {group: value, "all": value}
            result.rounds.append(Round("pd-kafka", name, WORKLOAD.name, number, values, cpu))
    result.summary = summarise(result)
    return result


def test_ratios_are_taken_within_a_round() -> None:
    row = _result().summary["pd-kafka"]["two"]["output_tokens_per_s"]
    assert row.ratio is not None
    assert (row.ratio.median, row.ratio.low, row.ratio.high) == (1.25, 0.5, 2.0)
    assert row.reference is not None
    assert row.reference.median == 55.0
    assert row.alone is not None
    assert row.alone.median == 110.0


def test_a_group_of_one_side_has_no_ratio() -> None:
    rows = _result().summary["pd-kafka"]["two"]
    row = rows["cpu_s_per_1k:api server"]
    assert (row.subject, row.ratio) == (None, None)
    assert row.reference is not None


def test_a_result_is_read_back_and_rendered(tmp_path: Path) -> None:
    result = _result()
    assert read(result.write(tmp_path)) == result == read(tmp_path / LATEST)
    page = markdown(result)
    assert "| output tokens/s | 110 | 55 | 35 | 1.25 | 0.50 – 2.00 |" in page
    assert "| idle: all (cores) | 0.250 |" in page
    assert len(tables(result)) == 1


def test_a_failed_run_does_not_become_the_latest(tmp_path: Path) -> None:
    result = _result()
    result.error = "RoundError: x"
    assert read(result.write(tmp_path)).error == "RoundError: x"
    assert not (tmp_path / LATEST).exists()


def test_cpu_of_a_process_tree_is_counted_for_its_group() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        spent = cpu_by_group({}, sample({process.pid: "burner"}))
        process.stdin.close()
    assert spent["burner"] >= 0.29  # the kernel counts in ticks of 10 ms
    assert cpu_by_group(own := sample({os.getpid(): "own"}), own)["own"] == 0.0
