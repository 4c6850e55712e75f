"""One run: pair after pair, round by round; whoever is not measured stands still."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.benchmarks.contender import ENVIRONMENT, MODEL_NAME, Contender, Model
from tests.benchmarks.figures import check, check_worked, figures, per_thousand_tokens, same_answers, summarise
from tests.benchmarks.load import LoadGenerator, Measured, Order
from tests.benchmarks.processes import Sample, cpu_by_group, peak_by_group
from tests.benchmarks.report import Board
from tests.benchmarks.results import IdleProcess, Result, Round, Sheet, machine, now, software
from tests.benchmarks.sides import ENGINE_ARGS, MAIN, MAX_MODEL_LEN, RAY_LLM_PYTHON, make_contender
from tests.benchmarks.trace import TRACE, capacity_run, read_slice, replay
from tests.benchmarks.workloads import QUICK, SHORT, Workload

SETTLE_S = 0.3
"""After a round: what a contender still has to do for it (commits, metrics) is charged to that round."""
WARM_UP = QUICK
"""Thrown away at the start of a pair, on both sides: first connections, transfers and memory."""


class Plan(NamedTuple):
    """What to run. ``traces``: the folder of the trace that is replayed, if any is. ``everywhere``: every pair gets
    every workload, not the :data:`~tests.benchmarks.sides.MAIN` ones only."""

    pairs: Sequence[tuple[str, str]]
    workloads: Sequence[Workload]
    rounds: int
    idle_s: float
    model: Model
    traces: Path | None = None
    everywhere: bool = False
    seed: int = 0


class Taken(NamedTuple):
    """What one round on one side took, with CPU seconds by group."""

    measured: Measured
    cpu_s: dict[str, float]


class Session:
    """Runs a plan. ``result`` grows as it goes, so that a failed run can still be looked at."""

    def __init__(self, plan: Plan, board: Board) -> None:
        self._plan = plan
        self._board = board
        self._seed = plan.seed
        self._running: dict[str, Contender] = {}
        self._lives: dict[str, ExitStack] = {}
        self.result = Result(
            started=now(),
            machine=machine(),
            software=software(RAY_LLM_PYTHON.parents[1]),
            settings={
                "model": Path(plan.model.path).name,
                "dtype": plan.model.dtype,
                "max_model_len": MAX_MODEL_LEN,
                "engine_args": ENGINE_ARGS,
                "environment": ENVIRONMENT,
                "rounds": plan.rounds,
                "idle_s": plan.idle_s,
                "seed": plan.seed,
            },
            workloads=list(plan.workloads),
        )
        self._arrivals = read_slice(plan.traces) if plan.traces else None
        if plan.traces and self._arrivals is None:
            self.result.skipped.append(f"replay: there is no {TRACE} below {plan.traces}")

    def run(self, results: Path) -> Path:
        """Run the whole plan and write its result below ``results``; returns the file.

        Raises:
            ContenderError, LoadError, RoundError, ServerError: nothing after that point was measured.
        """
        started = time.monotonic()
        logs = results / "logs" / self.result.started.replace(":", "")
        try:
            with short_folder(logs) as folder:
                self._compare_all(folder)
        except BaseException as error:
            self.result.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.result.seconds = round(time.monotonic() - started, 1)
            self.result.comparisons = [] if self.result.error else summarise(self.result)
            path = self.result.write(results)
        return path

    def _compare_all(self, folder: Path) -> None:
        for what in self.result.skipped:
            self._board.say(f"skipped: {what}")
        with LoadGenerator(folder / "load.log") as load:
            self._board.say("load generator ready")
            try:
                for pair in self._plan.pairs:
                    self._stop_all_but(pair)
                    self._compare(load, [self._contender(name, folder) for name in pair])
            finally:
                self._stop_all_but(())

    def _stop_all_but(self, pair: Sequence[str]) -> None:
        with ExitStack() as stack:  # each is stopped, whatever becomes of the others
            for name in [name for name in self._lives if name not in pair]:
                stack.push(self._lives.pop(name))

    def _contender(self, name: str, folder: Path) -> Contender:
        """The running contender of this name; starts it when it is not up. The others stand still meanwhile."""
        if name not in self._running:
            for other in self._running.values():
                other.freeze()
            life = self._lives[name] = ExitStack()
            life.enter_context(self._live(make_contender(name, folder, self._plan.model)))
        return self._running[name]

    @contextmanager
    def _live(self, contender: Contender) -> Iterator[None]:
        with ExitStack() as stack:
            with self._board.busy(f"starting {contender.name}"):
                stack.enter_context(contender)
            self._board.say(f"{contender.name} ready after {contender.ready_s()['all']} s")
            self._running[contender.name] = contender
            try:
                yield
            finally:
                del self._running[contender.name]
        if contender.left_behind and (sheet := self.result.contenders.get(contender.name)):
            self.result.contenders[contender.name] = msgspec.structs.replace(sheet, left_behind=contender.left_behind)

    def _compare(self, load: LoadGenerator, sides: Sequence[Contender]) -> None:
        whole = self._plan.everywhere or tuple(side.name for side in sides) in MAIN
        workloads = [each for each in self._plan.workloads if whole or each in SHORT]
        replayed = whole and self._arrivals is not None
        steps = len(WARM_UP) + replayed + (len(workloads) + replayed) * self._plan.rounds
        with self._board.progress(" / ".join(side.name for side in reversed(sides)), steps) as advance:
            for workload in WARM_UP:
                self._turn(load, sides, workload)
                advance()
            if replayed and self._arrivals is not None:
                capacity = self._turn(load, sides, capacity_run(self._arrivals))
                workloads.append(replay(self._arrivals, capacity[sides[0].name].measured.duration_s))
                advance()
            for number in range(self._plan.rounds):
                for workload in workloads:
                    self._record(sides, workload, number, self._turn(load, sides, workload))
                    advance()
        self._fill_sheets(sides)

    def _fill_sheets(self, sides: Sequence[Contender]) -> None:
        for contender in sides:
            if contender.name not in self.result.contenders:
                self._awake_alone(contender)
                idle, peak = self._idle(contender), peak_by_group(contender.sample().values())
                self.result.contenders[contender.name] = Sheet(contender.ready_s(), peak, idle)

    def _turn(self, load: LoadGenerator, sides: Sequence[Contender], workload: Workload) -> dict[str, Taken]:
        """The same prompts for each side, one side after the other."""
        self._seed += 1
        return {side.name: self._one(load, side, workload) for side in sides}

    def _one(self, load: LoadGenerator, side: Contender, workload: Workload) -> Taken:
        self._awake_alone(side)
        order = Order(side.url, self._plan.model.path, MODEL_NAME, workload, self._seed)
        before = side.sample()
        measured = load.run(order)
        time.sleep(SETTLE_S)
        side.check_alive()
        check(side.name, workload, measured)
        spent = cpu_by_group(before, side.sample())
        check_worked(side.name, workload, spent, side.workers)
        return Taken(measured, spent)

    def _awake_alone(self, side: Contender) -> None:
        """Nobody else uses the machine while this one is measured."""
        for other in self._running.values():
            if other is not side:
                other.freeze()
        side.thaw()

    def _record(self, sides: Sequence[Contender], workload: Workload, number: int, turn: dict[str, Taken]) -> None:
        reference, subject = (side.name for side in sides)
        same = same_answers(turn[reference].measured, turn[subject].measured)
        for name, taken in turn.items():
            values = figures(taken.measured) | {"same_answers": same}
            cpu = per_thousand_tokens(taken.cpu_s, taken.measured)
            self.result.rounds.append(Round(reference, subject, name, workload.name, number, values, cpu))
        if workload.name not in [known.name for known in self.result.workloads]:
            self.result.workloads.append(workload)

    def _idle(self, side: Contender) -> list[IdleProcess]:
        """CPU of every process while nothing is asked of it."""
        with self._board.busy(f"{side.name} idle for {self._plan.idle_s:g} s"):
            before, started = side.sample(), time.monotonic()
            time.sleep(self._plan.idle_s)
            return _idle_processes(before, side.sample(), time.monotonic() - started)


def _idle_processes(before: Sample, after: Sample, seconds: float) -> list[IdleProcess]:
    return [
        IdleProcess(usage.title, usage.group, (usage.cpu_s - before[process].cpu_s) / seconds, usage.nice)
        for process, usage in after.items()
        if process in before
    ]


@contextmanager
def short_folder(logs: Path) -> Iterator[Path]:
    """A temporary folder with a short path; the parts' logs (not the files of Ray and Kafka) are kept in ``logs``."""
    with tempfile.TemporaryDirectory(prefix="psb-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            logs.mkdir(parents=True, exist_ok=True)
            for log in (log for depth in ("*.log", "*/*.log", "*/*/*.log") for log in folder.glob(depth)):
                shutil.copy(log, logs / "-".join(log.relative_to(folder).parts))
