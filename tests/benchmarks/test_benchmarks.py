"""What decides whether a figure may be believed: checks, arithmetic, the process table, the result file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.benchmarks.figures import (
    LOAD_GROUP,
    LONG_PROMPT,
    RoundError,
    check,
    check_worked,
    figures,
    per_thousand_tokens,
    summarise,
)
from tests.benchmarks.goals import difference, path_share, standings
from tests.benchmarks.load import Measured
from tests.benchmarks.pages import BEGIN, END, PageError, markdown, write_into
from tests.benchmarks.plots import draw
from tests.benchmarks.processes import cpu_by_group, sample, signal_all
from tests.benchmarks.report import tables
from tests.benchmarks.results import (
    LATEST,
    LATEST_SCALE,
    Comparison,
    IdleProcess,
    Result,
    Round,
    Row,
    Scaled,
    Sheet,
    Spread,
    read,
)
from tests.benchmarks.sides import pairs_of
from tests.benchmarks.trace import LOAD, LONGEST_PROMPT, SHORTEST, capacity_run, read_slice, replay, scaled
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
        ({"output_lens": [3, 2]}, "output tokens: 1 of 2 wrong, such as 2 for 3"),
        ({"input_lens": [5, 6]}, "prompt tokens: 1 of 2 wrong, such as 6 for 5"),
        ({"input_lens": [5]}, "prompt tokens: some missing"),
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


def test_parts_that_did_nothing_are_found() -> None:
    check_worked("pd-kafka", WORKLOAD, {"kafka": 0.01}, ("kafka",))
    with pytest.raises(RoundError, match="next to nothing: kafka"):
        check_worked("pd-kafka", WORKLOAD, {"engine": 1.0}, ("engine", "kafka"))


def test_a_prefill_engine_that_is_passed_by_is_found() -> None:
    """An idle engine uses some CPU as well; long prompts tell."""
    pair, cpu = ("prefill engine", "decode engine"), {"prefill engine": 0.02, "decode engine": 1.0}
    check_worked("pd-redis", WORKLOAD, cpu, pair)
    with pytest.raises(RoundError, match="next to nothing: prefill engine"):
        check_worked("pd-redis", msgspec.structs.replace(WORKLOAD, prompt_tokens=LONG_PROMPT), cpu, pair)


def _result() -> Result:
    result = Result(
        started="2026-01-02T03:04:05Z",
        machine={"cpu": "c", "cores": 2, "memory_gib": 8.0, "load_average_before": 0.1},
        software={"ray": "1"},
        settings={"rounds": 2, "model": "m", "dtype": "auto"},
        workloads=[WORKLOAD],
        contenders={"vllm": Sheet({"all": 1.0}, {"engine": 5.0}, [IdleProcess("p", "engine", 0.25, 0)])},
    )
    for number, (reference, subject) in enumerate([(100.0, 50.0), (10.0, 20.0)]):
        for name, value, group in (("vllm", reference, "api server"), ("pd-kafka", subject, "ingress")):
            values = dict.fromkeys(figures(GOOD), value)
            cpu = {group: value, "all": value, LOAD_GROUP: value}
            result.rounds.append(Round("vllm", "pd-kafka", name, WORKLOAD.name, number, values, cpu))
    result.comparisons = summarise(result)
    return result


def test_ratios_are_taken_within_a_round() -> None:
    row = _result().comparisons[0].workloads["two"]["output_tokens_per_s"]
    assert row.ratio is not None
    assert (row.ratio.median, row.ratio.low, row.ratio.high) == (1.25, 0.5, 2.0)
    assert row.reference is not None
    assert row.reference.median == 55.0


def test_a_group_of_one_side_has_no_ratio() -> None:
    row = _result().comparisons[0].workloads["two"]["cpu_s_per_1k:api server"]
    assert (row.subject, row.ratio) == (None, None)
    assert row.reference is not None


def test_a_result_is_read_back_and_rendered(tmp_path: Path) -> None:
    result = _result()
    assert read(result.write(tmp_path)) == result == read(tmp_path / LATEST)
    page = markdown([result])
    assert "| two | 55 | 35 | 1.25 | 0.50 – 2.00 |" in page
    assert "| idle: all (cores) | 0.250 |" in page
    assert len(tables(result)) == 1


def test_what_was_scaled_is_a_result_of_its_own(tmp_path: Path) -> None:
    result = Result("2026-01-02T03:04:05Z", _result().machine, {}, {"rounds": 3})
    result.scale = [Scaled("streams", at, "output_tokens_per_s", [1.0, 3.0, 2.0]) for at in ("1", "10")]
    result.write(tmp_path)
    assert read(tmp_path / LATEST_SCALE) == result
    assert not (tmp_path / LATEST).exists()
    assert "| 10 | 2 |" in markdown([result])
    assert tables(result)[0].row_count == 2


def test_a_failed_run_does_not_become_the_latest(tmp_path: Path) -> None:
    result = _result()
    result.error = "RoundError: x"
    assert read(result.write(tmp_path)).error == "RoundError: x"
    assert not (tmp_path / LATEST).exists()


def test_goals_are_held_against_what_was_measured() -> None:
    result = _result()
    rows = result.comparisons[0].workloads["two"]
    rows |= {"cpu_s_per_1k:kafka": Row(None, Spread(7.0, 7.0, 7.0), None)}
    assert path_share(rows) == pytest.approx((35 + 7) / 35)
    assert difference("ttft_ms_p50")(rows) == pytest.approx(35 - 55)
    result.comparisons = [Comparison("ray-serve-llm", "pd-kafka", {"32 streams, 101/32": rows})]
    throughput, first_token = standings([result])
    assert (throughput.wanted, throughput.measured, throughput.met) == ("at least 5x", "1.25x", False)
    assert (first_token.wanted, first_token.measured, first_token.met) == ("at most 0.25x", "1.25x", False)
    assert "| at least 5x | **1.25x** |" in markdown([result])


def test_the_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(page, "new")
    write_into(page, "newer")
    assert page.read_text() == f"before\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(PageError):
        write_into(page, "new")


def test_the_plots_that_have_figures_are_drawn(tmp_path: Path) -> None:
    result = _result()
    result.scale = [Scaled("streams", at, "cpu_s_per_1k:redis", [0.1, 0.2]) for at in ("1", "10")]
    drawn = [name for _, name in draw([result], tmp_path)]
    assert drawn == ["scale-streams.png"]
    assert (tmp_path / "scale-streams.png").read_bytes().startswith(b"\x89PNG")


def test_subjects_are_measured_against_vllm_and_ray_against_prefill_decode_on_kafka() -> None:
    assert pairs_of(["pd-kafka", "ray-serve-llm"]) == [("vllm", "pd-kafka"), ("ray-serve-llm", "pd-kafka")]
    assert pairs_of(["mixed-redis"]) == [("vllm", "mixed-redis")]


ROWS = [
    {"timestamp_s": str(at), "input_tokens": str(prompt), "output_tokens": str(output), "hash_ids": "1 2 3 4"}
    for at, prompt, output in ((599.0, 5, 5), (600.0, 1600, 320), (610.0, 10**6, 1), (620.0, 3, 3))
]


def test_a_trace_is_cut_and_its_lengths_divided() -> None:
    arrivals = scaled(ROWS)
    assert [arrival.at_s for arrival in arrivals] == [0.0, 10.0, 20.0]
    assert [arrival.prompt_tokens for arrival in arrivals] == [100, LONGEST_PROMPT, SHORTEST]
    assert [arrival.output_tokens for arrival in arrivals] == [20, SHORTEST, SHORTEST]


def test_prompts_of_a_trace_share_whole_blocks_only() -> None:
    """A block of 512 tokens is one of 32 here: a prompt of 100 has three."""
    assert [arrival.blocks for arrival in scaled(ROWS)] == [(1, 2, 3), (1, 2, 3, 4), ()]


def test_a_replay_offers_a_share_of_what_was_measured() -> None:
    """All requests took 4 s when sent at once: at half of that load they come within 8 s."""
    workload = replay(scaled(ROWS), capacity_s=4.0)
    assert [arrival.at_s for arrival in workload.arrivals] == [0.0, 4.0, 4.0 / LOAD]
    assert workload.open_loop
    assert workload.prompt_lens == [100, LONGEST_PROMPT, SHORTEST]
    assert hash(workload) == hash(replay(scaled(ROWS), capacity_s=4.0))  # prompts are remembered by workload
    closed = capacity_run(scaled(ROWS))
    assert not closed.open_loop
    assert closed.requests == 3


def test_a_missing_trace_is_no_error(tmp_path: Path) -> None:
    assert read_slice(tmp_path) is None


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


def test_a_frozen_tree_stands_still_and_goes_on() -> None:
    child = "print(flush=True)\nwhile True: print(input(), flush=True)"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        signal_all(sample({process.pid: "child"}), signal.SIGSTOP)
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT) is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        signal_all(sample({process.pid: "child"}), signal.SIGCONT)
        assert process.stdout.readline() == b"hello\n"
        process.kill()


def test_an_engine_belongs_to_the_server_that_started_it() -> None:
    """vLLM calls all its engine processes alike; Ray Serve LLM has one for prefill and one for decode."""
    engine = "exec -a VLLM::EngineCore cat"
    server = f"exec -a ray::ServeReplica:default:Prefill:bench bash -c '(bash -c \"{engine}\"); true'"
    with subprocess.Popen(["bash", "-c", server], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdin.write(b"up\n")
        process.stdin.flush()
        process.stdout.readline()
        groups = {usage.title: usage.group for usage in sample({process.pid: "ray"}).values()}
        process.stdin.close()
    assert groups["VLLM::EngineCore"] == "prefill engine"
    assert groups["ray::ServeReplica:default:Prefill:bench"] == "prefill server"
