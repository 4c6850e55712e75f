"""``penstock bench compare``: what counts as moved, and what the command says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.serving.cli.bench_command import (
    BenchResult,
    Round,
    command,
    compare,
    median_distribution,
    ratio_interval,
    samples,
)
from tests.benchmarks import results

pytestmark = pytest.mark.unit

STEADY = [98.0, 99.0, 100.0, 101.0, 102.0]


def _result(subject: list[float], *, machine: float = 1.0, figure: str = "output_tokens_per_s") -> BenchResult:
    """Rounds in which the reference always gives 100, on a machine so many times as fast."""
    rounds = []
    for number, value in enumerate(subject):
        for name, found in (("vllm", 100.0), ("pd-kafka", value)):
            rounds.append(Round("vllm", "pd-kafka", name, "two", number, {figure: found * machine}, {}))
    return BenchResult("2026-01-02T03:04:05Z", rounds)


def test_the_distribution_of_the_median_is_exact() -> None:
    """Of three values, the smallest is the median of 7 of 27 resamples, the middle one of 13."""
    weights = [weight * 27 for _, weight in median_distribution([3.0, 1.0, 2.0])]
    assert weights == pytest.approx([7, 13, 7])


def test_the_interval_of_equal_samples_holds_one() -> None:
    low, high = ratio_interval(STEADY, STEADY)
    assert low < 1 < high
    assert high < 1.05


def test_a_drop_beyond_the_spread_is_worse() -> None:
    (change,) = compare(_result(STEADY), _result([value * 0.8 for value in STEADY]))
    assert change.moved
    assert change.worse
    assert change.factor == pytest.approx(0.8)
    assert change.high < 1


def test_a_drop_within_the_spread_did_not_move() -> None:
    noisy = [60.0, 80.0, 100.0, 120.0, 140.0]
    (change,) = compare(_result(noisy), _result([value * 0.8 for value in noisy]))
    assert not change.moved


def test_a_small_change_is_nobodys_concern_however_certain() -> None:
    (change,) = compare(_result([100.0] * 5), _result([99.0] * 5))
    assert not change.moved


def test_of_a_latency_more_is_worse() -> None:
    (change,) = compare(_result(STEADY, figure="ttft_ms_p50"), _result([150.0] * 5, figure="ttft_ms_p50"))
    assert change.moved
    assert change.worse


def test_another_machine_changes_nothing() -> None:
    (change,) = compare(_result(STEADY), _result(STEADY, machine=0.4))
    assert change.factor == pytest.approx(1.0)
    assert change.relative


def test_what_the_reference_lacks_is_compared_as_it_is() -> None:
    one = Round("vllm", "pd-kafka", "pd-kafka", "two", 0, {}, {"kafka": 0.3})
    other = Round("vllm", "pd-kafka", "vllm", "two", 0, {}, {"api server": 0.2})
    found = samples(BenchResult("t", [one, other]))
    assert found == {(("pd-kafka / vllm", "two", "cpu_s_per_1k:kafka"), False): [0.3]}


def test_three_rounds_say_nothing() -> None:
    assert compare(_result([100.0] * 3), _result([50.0] * 3)) == []


def _files(folder: Path, before: float, after: float) -> list[str]:
    paths = []
    for name, value in (("a", before), ("b", after)):
        result = results.Result("2026-01-02T03:04:05Z", {}, {}, {})
        result.scale = [results.Scaled("streams", "10", "output_tokens_per_s", [value] * 4)]
        paths.append(str(result.write(folder / name)))
    return paths


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["compare", *arguments])


def test_a_regression_fails_only_when_asked(tmp_path: Path) -> None:
    paths = _files(tmp_path, 100.0, 50.0)
    assert _run(*paths).exit_code == 0
    failed = _run(*paths, "--fail")
    assert failed.exit_code == 1
    assert "1 figures compared: 1 worse, 0 better" in failed.output
    assert "0.50" in failed.output


def test_an_improvement_does_not_fail(tmp_path: Path) -> None:
    done = _run(*_files(tmp_path, 50.0, 100.0), "--fail")
    assert done.exit_code == 0
    assert "0 worse, 1 better" in done.output


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")
    done = _run(str(path), str(path))
    assert done.exit_code == 1
    assert "no benchmark result" in done.output
