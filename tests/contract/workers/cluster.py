"""A whole pool in one process: real queue, real token log, dispatchers, and engine hosts with a brake."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from penstock.queue.dead_letters import DeadLetter
from penstock.queue.errors import QueueUnavailable
from penstock.queue.factory import open_queue
from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.redis_server import RedisServer
from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.messages import Finish, Frame
from penstock.queue.protocol import RequestQueue
from penstock.queue.readers import Readers
from penstock.queue.records import Record
from penstock.queue.redis_client import connect, connect_async
from penstock.queue.registry import Replica
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog, emitted_tokens
from penstock.workers.dispatcher import Dispatcher
from penstock.workers.engine import Job, Output
from penstock.workers.host import EngineHost
from penstock.workers.metrics import EngineMetrics
from penstock.workers.settings import WorkerSettings
from penstock.workers.simulated.engine import Prepared, SimulatedEngine
from penstock.workers.simulated.tokens import expected_tokens
from tests.support.requests import make_record
from tests.support.waiting import eventually_async

PATIENCE_S = 45
POOL = "default"
INGRESS = "ingress:test"
LIMITS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "num_gpu_blocks_override": 256,
    "max_model_len": 512,
}
MIXED = {"mixed": 1, "prefill": 0, "decode": 0}
SPLIT = {"short_prompt_tokens": 0}


class BrakedEngine(SimulatedEngine):
    """A simulated engine that takes a step only when it may, and remembers how full it has been."""

    def __init__(self, model: ModelSettings, workers: WorkerSettings, role: str) -> None:
        super().__init__(model, workers, role)
        self._brake = threading.Condition()
        self._allowed: int | None = None
        self.most_requests = 0
        self.started: list[str] = []
        self.jobs: list[Job] = []
        self.refused = 0
        self.poison: str | None = None
        self.lethal: dict[str, Callable[[], None]] = {}
        """What to do when a request arrives that kills."""
        self.twist = False
        """Give other tokens than every other engine."""

    def hold(self) -> None:
        """Stop before the next step."""
        with self._brake:
            self._allowed = 0

    def allow(self, steps: int | None = None) -> None:
        """So many steps more; None: run freely."""
        with self._brake:
            self._allowed = None if steps is None else (self._allowed or 0) + steps
            self._brake.notify()

    def prepare(self, job: Job) -> Prepared:
        if self.poison is not None and job.record.id == self.poison:
            self.refused += 1
            raise ZeroDivisionError("a request that breaks its conversion")
        self.jobs.append(job)
        if kill := self.lethal.pop(job.record.id, None):
            self.hold()
            kill()
        return super().prepare(job)

    def add(self, prepared: Prepared) -> None:
        super().add(prepared)
        load = self.load()
        self.most_requests = max(self.most_requests, load.running + load.waiting)
        self.started.append(getattr(prepared, "id", ""))

    def step(self) -> tuple[list[Output], bool]:
        with self._brake:
            if not self._brake.wait_for(lambda: self._allowed is None or self._allowed > 0, timeout=0.02):
                return [], False
            if self._allowed is not None:
                self._allowed -= 1
        outputs, executed = super().step()
        if self.twist:
            outputs = [output._replace(tokens=[token + 1 for token in output.tokens]) for output in outputs]
        return outputs, executed


class Worker:
    """One engine host."""

    def __init__(self, settings: RedisSettings, role: str, limits: dict[str, int]) -> None:
        self.id = f"{role}-{uuid.uuid4().hex[:8]}"
        self.settings = settings
        self.died = self.stopped = False
        model = ModelSettings(path="simulated", engine_args=LIMITS | limits)
        self.engine = BrakedEngine(model, WorkerSettings.model_validate(MIXED), role)
        info = msgspec.to_builtins(self.engine.info)
        replica = Replica(id=self.id, pool=POOL, role=role, node="here", pid=0, **info)
        self.host = EngineHost(self.engine, settings, replica, EngineMetrics("m", role, self.id))
        self.host.start()

    def die(self) -> None:
        """Dead to everybody else, while its engine works on: the harder death, as its appends must be refused."""
        self.died = True
        self.host.leave()
        with connect(self.settings) as client:
            client.delete(f"{self.settings.namespace}left:{self.id}")  # it did not say goodbye

    def drain(self, grace_s: float) -> None:
        """What SIGTERM does to an engine process."""
        self.host.drain(grace_s)
        self.host.stop()
        self.stopped = True

    def stop(self) -> None:
        self.engine.allow()
        if not self.stopped:
            self.host.stop()


class Running:
    """A dispatcher at work."""

    def __init__(self, settings: RedisSettings, workers: dict[str, Any], queue: QueueSettings) -> None:
        self.queue = open_queue(queue, settings, POOL)
        self._client = connect_async(settings)
        configured = WorkerSettings.model_validate(workers)
        self.dispatcher = Dispatcher(self.queue, self._client, settings, configured, POOL)
        self._task = asyncio.create_task(self.dispatcher.run())

    async def stop(self) -> None:
        """End it; it must not have failed by itself."""
        self._task.cancel()
        _, pending = await asyncio.wait({self._task}, timeout=PATIENCE_S)
        if pending:
            for task in asyncio.all_tasks():
                task.print_stack()
        assert not pending, "the dispatcher ignored its cancellation"
        (result,) = await asyncio.gather(self._task, return_exceptions=True)
        await self.queue.close()
        await self._client.aclose()
        assert isinstance(result, asyncio.CancelledError), result


class Cluster:
    """Workers, dispatchers, and an ingress that publishes and reads."""

    def __init__(self, settings: RedisSettings, workers: dict[str, Any], queue: QueueSettings | None = None) -> None:
        self.queue_settings = queue or QueueSettings(backend="redis")
        self.server: RedisServer | None = None
        self.broker: KafkaBroker | None = None
        self.settings = settings
        self.shape = dict(workers)  # tests change it
        self.client = connect_async(settings)
        self.log = RequestLog(self.client, settings)
        self.queue: RequestQueue = open_queue(self.queue_settings, settings, POOL)
        readers = Readers(self.client, settings, INGRESS)
        self.reader = TokenReader(Mailbox(self.client, settings, INGRESS), self.log, readers)
        self.seen: dict[str, list[Frame]] = {}
        self.ends: list[str] = []
        self._reading = asyncio.create_task(self._read())
        self._workers: list[Worker] = []
        self._dispatchers: list[Running] = []

    async def _read(self) -> None:
        async for batch in self.reader.batches():
            for item in batch:
                self.seen.setdefault(item.id, []).append(item.frame)
                if item.frame.finish is not None:
                    self.ends.append(item.id)

    def add(self, role: str = "mixed", *, held: bool = False, **limits: int) -> Worker:
        worker = Worker(self.settings, role, limits)
        if held:
            worker.engine.hold()
        self._workers.append(worker)
        return worker

    def dispatch(self, **changes: Any) -> Running:
        """Start a dispatcher."""
        running = Running(self.settings, self.shape | changes, self.queue_settings)
        self._dispatchers.append(running)
        return running

    async def replace(self, old: Running) -> Running:
        """Let a dispatcher die and another take over."""
        self._dispatchers.remove(old)
        await old.stop()
        return self.dispatch()

    async def send(self, prompt: list[int] | int = 5, sampling: dict[str, Any] | None = None, **fields: Any) -> Record:
        """Publish a request and follow it."""
        record = make_record(prompt, sampling=sampling, reply_to=INGRESS, **fields)
        self.reader.open(record.id)
        await self.queue.publish(record)
        return record

    def follow(self, record: Record) -> None:
        """Read it from the beginning, as if nothing had been seen."""
        self.seen.pop(record.id, None)
        self.ends = [ended for ended in self.ends if ended != record.id]
        self.reader.close(record.id)
        self.reader.open(record.id)

    def tokens(self, record: Record) -> list[int]:
        return emitted_tokens(self.seen.get(record.id, []))

    async def until(self, condition: Callable[[], Awaitable[bool]] | Callable[[], bool], what: str) -> None:
        async def holds() -> bool:
            answer = condition()
            return answer if isinstance(answer, bool) else await answer

        await eventually_async(holds, PATIENCE_S, what)

    async def emitted(self, record: Record, tokens: int) -> None:
        """Wait until so many tokens have been read."""
        await self.until(lambda: len(self.tokens(record)) >= tokens, f"{tokens} tokens of {record.id}")

    async def end(self, record: Record) -> Frame:
        """The last frame of a request, once there."""
        await self.until(lambda: record.id in self.ends, f"the end of {record.id}; {self.seen.get(record.id)}")
        assert self.ends.count(record.id) == 1
        return self.seen[record.id][-1]

    async def completes(self, *records: Record) -> None:
        """Every request ends with exactly the tokens a single engine would have given it."""
        for record in records:
            end = await self.end(record)
            assert end.finish is Finish.LENGTH, end
            assert self.tokens(record) == expected_tokens(record.token_ids(), record.max_tokens)

    async def fails(self, record: Record, code: str) -> None:
        """It ends with this typed error, and what came before it is right."""
        end = await self.end(record)
        assert end.error is not None, end
        assert end.error.code == code, end
        tokens = self.tokens(record)
        assert tokens == expected_tokens(record.token_ids(), len(tokens))

    async def field(self, record: Record, name: str) -> str:
        value = await self.client.hget(f"{self.settings.namespace}req:{record.id}", name)
        return value.decode() if isinstance(value, bytes) else ""

    async def running_on(self, record: Record, worker: Worker) -> None:
        """Wait until a replica has been given the request, and its engine has it."""

        def taken() -> bool:
            return any(id_.startswith(record.id) for id_ in worker.engine.started)

        await self.until(taken, f"{record.id} on {worker.id}")

    async def drained(self) -> None:
        """Nothing is left in the queue: every accepted request was finished."""

        async def empty() -> bool:
            try:
                depth = await self.queue.depth()
            except QueueUnavailable:  # a broker that was restarted reads its offsets first
                return False
            return sum(of_class.requests for of_class in depth.values()) == 0

        await self.until(empty, "the queue is empty")

    async def dead_letters(self) -> list[DeadLetter]:
        return await self.queue.dead_letters(10)

    async def cut_connections(self) -> None:
        """Redis drops everybody."""
        async with connect_async(self.settings) as admin:
            for kind in ("pubsub", "normal"):
                await admin.client_kill_filter(_type=kind, skipme=True)

    async def close(self) -> None:
        for running in self._dispatchers:
            await running.stop()
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)
        self._reading.cancel()
        (result,) = await asyncio.gather(self._reading, return_exceptions=True)
        await self.queue.close()
        await self.client.aclose()
        assert isinstance(result, asyncio.CancelledError), result


STATEFUL = {"max_tokens": 8, "seed": 7}
CONTINUABLE = {"max_tokens": 8}
