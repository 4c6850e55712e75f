"""One run: the reference stays up, each subject in turn is measured against it, round by round."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.benchmarks.contender import ENVIRONMENT, Contender, Model
from tests.benchmarks.figures import check, figures, per_thousand_tokens, same_answers, summarise
from tests.benchmarks.load import LoadGenerator, Measured, Order
from tests.benchmarks.processes import Sample, cpu_by_group, peak_by_group
from tests.benchmarks.report import Board
from tests.benchmarks.results import ALONE, IdleProcess, Result, Round, Sheet, machine, now, software
from tests.benchmarks.sides import ENGINE_ARGS, MAX_MODEL_LEN, MODEL_NAME, REFERENCE, make_contender
from tests.benchmarks.workloads import Workload

SETTLE_S = 0.3
"""After a round: what a contender still has to do for it (commits, metrics) is charged to that round."""
WARM_UPS = 1
"""Rounds thrown away at the start of a comparison, on both sides: first connections, transfers and memory."""


class Plan(NamedTuple):
    """What to run."""

    subjects: Sequence[str]
    workloads: Sequence[Workload]
    rounds: int
    idle_s: float
    model: Model
    seed: int = 0


class Taken(NamedTuple):
    """What one round on one side took: CPU seconds by group, and the cores the idle other side used meanwhile."""

    measured: Measured
    cpu_s: dict[str, float]
    other_side_cores: float


class Session:
    """Runs a plan. ``result`` grows as it goes, so that a failed run can still be looked at."""

    def __init__(self, plan: Plan, board: Board) -> None:
        self._plan = plan
        self._board = board
        self._seed = plan.seed
        self.result = Result(
            started=now(),
            machine=machine(),
            software=software(),
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
            reference=REFERENCE,
            workloads=list(plan.workloads),
        )

    def run(self, results: Path) -> Path:
        """Run the whole plan and write its result below ``results``; returns the file.

        Raises:
            ContenderError, LoadError, RoundError, ServerError: nothing after that point was measured.
        """
        started = time.monotonic()
        logs = results / "logs" / self.result.started.replace(":", "")
        try:
            with _short_folder(logs) as folder:
                self._compare_all(folder)
        except BaseException as error:
            self.result.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.result.seconds = round(time.monotonic() - started, 1)
            self.result.summary = {} if self.result.error else summarise(self.result)
            path = self.result.write(results)
        return path

    def _compare_all(self, folder: Path) -> None:
        with LoadGenerator(folder / "load.log") as load:
            self._board.say("load generator ready")
            reference = make_contender(REFERENCE, folder, self._plan.model)
            with self._running(reference):
                self._measure(load, ALONE, [reference])
                for name in self._plan.subjects:
                    subject = make_contender(name, folder, self._plan.model)
                    with self._running(subject):
                        self._measure(load, name, [reference, subject])
                        self._fill_sheets([reference, subject])

    @contextmanager
    def _running(self, contender: Contender) -> Iterator[None]:
        with ExitStack() as stack:
            with self._board.busy(f"starting {contender.name}"):
                stack.enter_context(contender)
            self._board.say(f"{contender.name} ready after {contender.ready_s()['all']} s")
            yield
        if contender.left_behind and (sheet := self.result.contenders.get(contender.name)):
            self.result.contenders[contender.name] = msgspec.structs.replace(sheet, left_behind=contender.left_behind)

    def _measure(self, load: LoadGenerator, comparison: str, sides: Sequence[Contender]) -> None:
        steps = (WARM_UPS + self._plan.rounds) * len(self._plan.workloads)
        with self._board.progress(" / ".join(side.name for side in sides), steps) as advance:
            for number in range(-WARM_UPS, self._plan.rounds):
                for workload in self._plan.workloads:
                    turn = self._turn(load, sides, workload)
                    if number >= 0:
                        self._record(comparison, workload, number, turn)
                    advance()

    def _fill_sheets(self, sides: Sequence[Contender]) -> None:
        for contender, idle in zip(sides, self._idle(sides), strict=True):
            peak = peak_by_group(contender.sample().values())
            self.result.contenders[contender.name] = Sheet(contender.ready_s(), peak, idle)

    def _turn(self, load: LoadGenerator, sides: Sequence[Contender], workload: Workload) -> dict[str, Taken]:
        """The same prompts for each side, one side after the other."""
        self._seed += 1
        return {side.name: self._one(load, side, sides, workload) for side in sides}

    def _one(self, load: LoadGenerator, side: Contender, sides: Sequence[Contender], workload: Workload) -> Taken:
        order = Order(side.url, self._plan.model.path, MODEL_NAME, workload, self._seed)
        before, started = {c.name: c.sample() for c in sides}, time.monotonic()
        measured = load.run(order)
        time.sleep(SETTLE_S)
        seconds = time.monotonic() - started
        side.check_alive()
        check(side.name, workload, measured)
        spent = {c.name: cpu_by_group(before[c.name], c.sample()) for c in sides}
        others = sum(sum(cpu.values()) for name, cpu in spent.items() if name != side.name)
        return Taken(measured, spent[side.name], others / seconds)

    def _record(self, comparison: str, workload: Workload, number: int, turn: dict[str, Taken]) -> None:
        everyone = [taken.measured for taken in turn.values()]
        same = same_answers(everyone[0], everyone[-1])
        for name, taken in turn.items():
            values = figures(taken.measured)
            values |= {"same_answers": same, "other_side_cores": taken.other_side_cores}
            cpu = per_thousand_tokens(taken.cpu_s, taken.measured)
            self.result.rounds.append(Round(comparison, name, workload.name, number, values, cpu))

    def _idle(self, sides: Sequence[Contender]) -> list[list[IdleProcess]]:
        """CPU of every process while nothing is asked of either side."""
        with self._board.busy(f"idle for {self._plan.idle_s:g} s"):
            before, started = [side.sample() for side in sides], time.monotonic()
            time.sleep(self._plan.idle_s)
            seconds, after = time.monotonic() - started, [side.sample() for side in sides]
        return [_idle_processes(*samples, seconds) for samples in zip(before, after, strict=True)]


def _idle_processes(before: Sample, after: Sample, seconds: float) -> list[IdleProcess]:
    return [
        IdleProcess(usage.title, usage.group, (usage.cpu_s - before[process].cpu_s) / seconds, usage.nice)
        for process, usage in after.items()
        if process in before
    ]


@contextmanager
def _short_folder(logs: Path) -> Iterator[Path]:
    """A temporary folder with a short path; the parts' logs (not the files of Ray and Kafka) are kept in ``logs``."""
    with tempfile.TemporaryDirectory(prefix="psb-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            logs.mkdir(parents=True, exist_ok=True)
            for log in (log for depth in ("*.log", "*/*.log", "*/*/*.log") for log in folder.glob(depth)):
                shutil.copy(log, logs / "-".join(log.relative_to(folder).parts))
