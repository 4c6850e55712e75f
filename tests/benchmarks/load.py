"""The load generator: vLLM's own (``vllm bench serve``), in one process that serves a whole run.

vLLM's benchmark command imports for fifteen seconds, so the process (``python -m tests.benchmarks.load``)
stays: an :class:`Order` a line comes in, a :class:`Measured` a line goes out. It ends when its input does.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec

from tests.benchmarks.prompts import Prompts
from tests.benchmarks.workloads import Workload

EVENT_ID = re.compile(rb"(?m)^id: [^\n]*\n")

STOP_TIMEOUT_S = 10.0
"""It ends when it sees the end of its input; a round takes a few seconds."""
LOG_TAIL_LINES = 20


ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1",  # vLLM's client heeds the environment's proxies
}


class LoadError(RuntimeError):
    """The load generator ended; the message has the end of its log."""


class Order(msgspec.Struct, frozen=True):
    """One round against one server; prompts depend on workload and seed alone."""

    url: str
    model_path: str
    model_name: str
    workload: Workload
    seed: int


class Measured(msgspec.Struct, frozen=True):
    """What vLLM's benchmark measured, per request, in seconds and tokens; ``cpu_s``: the load generator's."""

    duration_s: float
    completed: int
    input_lens: list[int]
    output_lens: list[int]
    ttfts: list[float]
    itls: list[list[float]]
    latencies: list[float]
    errors: list[str]
    answers: list[str]
    cpu_s: float


class LoadGenerator:
    """``with LoadGenerator(log) as load: load.run(order)``."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.load"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        self._answer()  # an empty line: it has imported everything
        return self

    def run(self, order: Order) -> Measured:
        """Run one round. Errors of requests are in the result; raises :class:`LoadError` for its own."""
        stdin = self._open.stdin
        assert stdin is not None
        stdin.write(msgspec.json.encode(order) + b"\n")
        stdin.flush()
        return msgspec.json.decode(self._answer(), type=Measured)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._open, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        if error is not None:
            process.kill()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def _open(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "use it in a with block"
        return self._process

    def _answer(self) -> bytes:
        stdout = self._open.stdout
        assert stdout is not None
        if line := stdout.readline():
            return line
        with suppress(subprocess.TimeoutExpired):
            self._open.wait(STOP_TIMEOUT_S)  # its last words come after the end of its answers
        tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise LoadError("the load generator ended:\n" + "\n".join(tail))


async def measure(order: Order) -> Measured:
    """One call of vLLM's benchmark: streaming completions, greedy, end-of-sequence ignored."""
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = _requests(order.model_path, order.workload, order.seed)
    cpu = time.process_time()
    result = await benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"{order.url}/v1/completions",
        base_url=order.url,
        model_id=order.model_path,
        model_name=order.model_name,
        tokenizer=_tokenizer(order.model_path),
        input_requests=requests,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=order.workload.concurrency or None,
        self_timed=order.workload.open_loop,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0.0},
        ready_check_timeout_sec=0,  # it would put the first prompt into the prefix cache
    )
    return _measured(result, time.process_time() - cpu)


def _measured(result: dict[str, Any], cpu_s: float) -> Measured:
    same = {name: result[name] for name in ("completed", "input_lens", "output_lens", "ttfts", "itls", "latencies")}
    answers = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in result["generated_texts"]]
    errors = [error for error in result["errors"] if error]
    return Measured(duration_s=result["duration"], errors=errors, answers=answers, cpu_s=cpu_s, **same)


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(path)


@lru_cache(maxsize=2)
def _requests(path: str, workload: Workload, seed: int) -> list[Any]:
    import numpy as np
    from vllm.benchmarks.datasets import SampleRequest

    prompts = Prompts(_tokenizer(path), np.random.default_rng(seed))
    timed = [arrival.at_s if workload.open_loop else None for arrival in workload.arrivals]
    return [
        SampleRequest(prompt=prompt, prompt_len=prompt_len, expected_output_len=output_len, timestamp=at_s)
        for prompt, prompt_len, output_len, at_s in zip(
            prompts.of(workload),
            workload.prompt_lens,
            workload.output_lens,
            timed or [None] * workload.requests,
            strict=True,
        )
    ]


def serve(orders: IO[bytes], answers: IO[bytes]) -> None:
    """The load generator's process."""
    import vllm.benchmarks.serve  # noqa: F401  # paid for here, before the first round
    from vllm.benchmarks.lib import endpoint_request_func
    from vllm.utils.gc_utils import freeze_gc_heap

    class Handler(endpoint_request_func.StreamedResponseHandler):  # type: ignore[misc]
        """Reads events with an ``id:``, which vLLM's own takes for JSON."""

        def add_chunk(self, chunk_bytes: bytes) -> list[str]:
            messages: list[str] = super().add_chunk(EVENT_ID.sub(b"", chunk_bytes))
            return messages

    endpoint_request_func.StreamedResponseHandler = Handler

    freeze_gc_heap()  # as `vllm bench serve` does: no pauses for what was imported
    answers.write(b"\n")
    answers.flush()
    for line in orders:
        measured = asyncio.run(measure(msgspec.json.decode(line, type=Order)))
        answers.write(msgspec.json.encode(measured) + b"\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as answer_pipe:
        os.dup2(2, 1)  # vLLM prints its report; the answers have the pipe to themselves
        serve(sys.stdin.buffer, answer_pipe)
