"""Everything but the model: what a token costs on its way, and how that grows.

Engines are simulated and their steps take no time, so that what is left is what Penstock adds. Parts: the whole path
with HTTP (``http``), without it over streams (``streams``) and over replicas (``replicas``), Ray Serve's own response
streaming beside it (``token path``), the queues, and the two inner loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import ServerError
from tests.benchmarks.contender import MODEL_NAME, Model
from tests.benchmarks.figures import CPU_PREFIX, check, figures, per_thousand_tokens
from tests.benchmarks.load import LoadGenerator, Order
from tests.benchmarks.processes import cpu_by_group, sample
from tests.benchmarks.report import Board
from tests.benchmarks.results import Result, Scaled, machine, now, software
from tests.benchmarks.rig import MAX_SEQS, Client, Rig
from tests.benchmarks.session import SETTLE_S, short_folder
from tests.benchmarks.sides import SIMULATED, make_contender
from tests.benchmarks.workloads import Workload

STREAMS = (1, 10, 100, 1000, 5000)
FLEET = 20
"""Replicas behind the streams: they hold 5,000 without waiting."""
REPLICAS = (1, 10, 50, 200)
STREAMS_A_REPLICA = 8
ANSWER_TOKENS = 64
LEAST_REQUESTS = 300
"""Of a measurement: 19,200 tokens, about a second of CPU, of which the kernel counts hundredths."""
PATH_STREAMS, PATH_TOKENS, PATH_REQUESTS = 32, 256, 192
"""Both sides of the token path; long answers, for Ray Serve's streams have no queue before them."""
SERVE_TOKENS = 200
"""A stream; Ray Serve needs a second for each thousand."""
RECORDS = 3000
HTTP = (
    Workload("8", concurrency=8, prompt_tokens=101, output_tokens=128, requests=64),
    Workload("64", concurrency=64, prompt_tokens=101, output_tokens=128, requests=256),
)
TOKENS_PER_CORE = "tokens_per_core_per_s"


class Scale:
    """Runs all parts. ``result`` grows as it goes."""

    def __init__(self, rounds: int, model: Model, board: Board) -> None:
        self._rounds = rounds
        self._model = model
        self._board = board
        self._values: dict[tuple[str, str, str], list[float]] = {}
        self.result = Result(started=now(), machine=machine(), software=software(), settings={"rounds": rounds})

    def run(self, results: Path) -> Path:
        """Run everything and write the result below ``results``; returns the file."""
        started, logs = time.monotonic(), results / "logs" / self.result.started.replace(":", "")
        parts = (self._streams, self._replicas, self._token_path, self._queues, self._loops, self._http)
        try:
            for part in parts:
                with short_folder(logs) as folder:
                    part(folder)
        except BaseException as error:
            self.result.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.result.seconds = round(time.monotonic() - started, 1)
            self.result.scale = [Scaled(*key, values) for key, values in self._values.items()]
            path = self.result.write(results)
        return path

    # -- parts

    def _streams(self, folder: Path) -> None:
        """From one stream to five thousand, on one fleet."""
        with Rig(folder, FLEET) as rig, self._progress("streams", len(STREAMS)) as advance:
            for _ in range(self._rounds):
                for streams in STREAMS:
                    self._path("streams", str(streams), rig, streams, max(streams, LEAST_REQUESTS), ANSWER_TOKENS)
                    advance()

    def _replicas(self, folder: Path) -> None:
        """From one replica to two hundred, with as many streams for each."""
        with self._progress("replicas", len(REPLICAS)) as advance:
            for replicas in REPLICAS:
                streams = replicas * STREAMS_A_REPLICA
                with Rig(folder / str(replicas), replicas) as rig:
                    for _ in range(self._rounds):
                        requests = max(streams, LEAST_REQUESTS)
                        self._path("replicas", str(replicas), rig, streams, requests, ANSWER_TOKENS)
                        advance()

    def _token_path(self, folder: Path) -> None:
        """From an engine's step to whoever holds the client's connection, Penstock's way and Ray Serve's."""
        order = (PATH_STREAMS, SERVE_TOKENS, str(folder / "ray"))
        environment = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        with (
            Rig(folder, 1) as rig,
            Client("tests.benchmarks.serve_stream", order, environment, folder / "serve.log") as serve,
            self._progress("token path", 1) as advance,
        ):
            for _ in range(self._rounds):
                ours = self._path("token path", "penstock", rig, PATH_STREAMS, PATH_REQUESTS, PATH_TOKENS)
                theirs = self._serve_stream(serve)
                self._add("token path", "penstock / ray serve", TOKENS_PER_CORE, theirs / ours)
                advance()

    def _serve_stream(self, serve: Client) -> float:
        """Seconds of CPU per token of replica and reader; what Ray's own processes use is not counted."""
        roots = {serve.pid: "ray"}
        before = sample(roots)
        answer = serve.go()
        after = sample(roots)
        replicas = {
            process: usage._replace(group="engines")
            for process, usage in after.items()
            if "ServeReplica" in usage.title
        }
        spent = cpu_by_group(before, replicas) | {"client": answer["cpu_s"]}
        return self._costs("token path", "ray serve", answer, spent)

    def _queues(self, folder: Path) -> None:
        """Publish and pull rates of both."""
        with Rig(folder, 0) as rig, _kafka(folder / "kafka") as kafka:
            queues: dict[str, dict[str, str]] = {"redis": {}} | ({"kafka": kafka} if kafka else {})
            if not kafka:
                self.result.skipped.append("queue rates of Kafka: no Kafka could be started")
            with self._progress("queues", len(queues)) as advance:
                for number in range(self._rounds):
                    for name, settings in queues.items():
                        pool = {"PENSTOCK_MODEL_POOL": f"rates{number}"}
                        environment = rig.environment | settings | pool
                        self._client("queues", name, "tests.benchmarks.queue_rates", [RECORDS], environment, folder)
                        advance()

    def _loops(self, folder: Path) -> None:
        """Ledger and token log."""
        with Rig(folder, 0) as rig, self._progress("inner loops", 1) as advance:
            for _ in range(self._rounds):
                self._client("inner loops", "one core", "tests.benchmarks.micro", [], rig.environment, folder)
                advance()

    def _http(self, folder: Path) -> None:
        """The whole path: vLLM's load generator, HTTP, ingress, queue, dispatcher, a simulated engine, and back."""
        with (
            LoadGenerator(folder / "load.log") as load,
            make_contender(SIMULATED, folder, self._model) as contender,
            self._progress("http", len(HTTP)) as advance,
        ):
            for seed in range(self._rounds):
                for workload in HTTP:
                    before = contender.sample()
                    measured = load.run(Order(contender.url, self._model.path, MODEL_NAME, workload, seed))
                    time.sleep(SETTLE_S)
                    check(contender.name, workload, measured)
                    cpu = per_thousand_tokens(cpu_by_group(before, contender.sample()), measured)
                    values = figures(measured)
                    for group, value in cpu.items():
                        self._add("http", workload.name, CPU_PREFIX + group, value)
                    self._add("http", workload.name, TOKENS_PER_CORE, 1000 / cpu["all"])
                    for figure in ("output_tokens_per_s", "tokens_per_event"):
                        self._add("http", workload.name, figure, values[figure])
                    advance()

    # -- helpers

    def _path(self, part: str, at: str, rig: Rig, streams: int, requests: int, tokens: int) -> float:
        taken = rig.measure("tests.benchmarks.rig_client", (streams, requests, tokens))
        return self._costs(part, at, taken.answer, taken.cpu_s)

    def _costs(self, part: str, at: str, answer: Mapping[str, float], cpu_s: Mapping[str, float]) -> float:
        """Note what a measurement took; returns CPU seconds per token."""
        tokens, spent = answer["tokens"], sum(cpu_s.values())
        for group, seconds in (dict(cpu_s) | {"all": spent}).items():
            self._add(part, at, CPU_PREFIX + group, seconds / tokens * 1000)
        self._add(part, at, TOKENS_PER_CORE, tokens / spent)
        self._add(part, at, "output_tokens_per_s", tokens / answer["seconds"])
        return spent / tokens

    def _client(
        self, part: str, at: str, module: str, order: list[int], environment: dict[str, str], folder: Path
    ) -> None:
        with Client(module, order, environment, folder / "client.log") as client:
            for figure, value in client.go().items():
                self._add(part, at, figure, value)

    def _add(self, part: str, at: str, figure: str, value: float) -> None:
        self._values.setdefault((part, at, figure), []).append(value)

    @contextmanager
    def _progress(self, what: str, points: int) -> Iterator[Callable[[], None]]:
        with self._board.progress(what, points * self._rounds) as advance:
            yield advance


assert max(STREAMS) <= FLEET * MAX_SEQS


@contextmanager
def _kafka(folder: Path) -> Iterator[dict[str, str]]:
    """Settings of a broker of our own; none where there is no Kafka to start."""
    try:
        broker = KafkaBroker(folder)
        broker.start()
    except ServerError:
        yield {}
        return
    try:
        yield {"PENSTOCK_QUEUE_BACKEND": "kafka", "PENSTOCK_QUEUE_BOOTSTRAP": broker.bootstrap}
    finally:
        broker.stop()
