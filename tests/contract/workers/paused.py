"""A dispatcher or an engine as a process of its own, to be stopped in the middle of its work and woken again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.queue.settings import QueueSettings, RedisSettings
from tests.contract.workers.cluster import LIMITS, POOL


class Process:
    """``penstock WORDS``; its log is kept."""

    def __init__(self, folder: Path, queue: QueueSettings, redis: RedisSettings, *words: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        self._log = folder / f"{words[0]}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.serving.cli", *words],
                env=inherited | environment(queue, redis), stdout=log, stderr=log,
            )  # fmt: skip

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def logged(self, event: str) -> int:
        """How often this event is in its log."""
        return self._log.read_text().count(f'"{event}"')

    def end(self) -> None:
        self.wake()
        self._process.kill()
        self._process.wait()


def environment(queue: QueueSettings, redis: RedisSettings) -> dict[str, str]:
    return {
        "PENSTOCK_QUEUE_BACKEND": queue.backend,
        "PENSTOCK_QUEUE_BOOTSTRAP": queue.bootstrap,
        "PENSTOCK_REDIS_URL": redis.url,
        "PENSTOCK_REDIS_NAMESPACE": redis.namespace,
        "PENSTOCK_MODEL_PATH": "simulated",
        "PENSTOCK_MODEL_POOL": POOL,
        "PENSTOCK_MODEL_ENGINE_ARGS": json.dumps(LIMITS),
        "PENSTOCK_WORKERS_ENGINE": "simulated",
        "PENSTOCK_WORKERS_STEP_PROFILE": "h100/llama3.1-8b",
        "PENSTOCK_WORKERS_MIXED": "1",
        "PENSTOCK_WORKERS_PREFILL": "0",
        "PENSTOCK_WORKERS_DECODE": "0",
        "PENSTOCK_WORKERS_DISPATCHERS": "2",
    }


@contextmanager
def running(folder: Path, queue: QueueSettings, redis: RedisSettings, *words: str) -> Iterator[Process]:
    """Ended when the test is over, however it is."""
    process = Process(folder, queue, redis, *words)
    try:
        yield process
    finally:
        process.end()
