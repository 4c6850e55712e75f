"""Greedy output through prefill and decode pools equals vLLM's own offline output, token for token.

float32: bfloat16 rounds differently with the shape of the batch, in vLLM itself as well, so that two runs of one engine
already differ where two tokens are nearly equally likely.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from penstock.workers.demo_model import demo_model_path
from penstock.workers.settings import CPU_ENVIRONMENT
from tests.stack.conftest import RunningStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

MAX_TOKENS = 16
BLOCK = 128
"""vLLM's KV block on CPU."""
CONCURRENCY = 16
VOCABULARY = range(300, 2000)


def _prompts() -> list[list[int]]:
    """Over 200 prompts: lengths 1 to 1,500 with every multiple of the block size and its neighbours, shared prefixes,
    and repeats (which hit the prefix cache)."""
    chance = random.Random(7)
    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 101, 1499, 1500]
    lengths += [n + d for n in range(BLOCK, 1501, BLOCK) for d in (-1, 0, 1)]
    lengths += [chance.randint(1, 1500) for _ in range(90)]
    prompts = [[chance.choice(VOCABULARY) for _ in range(length)] for length in lengths]
    stem = [chance.choice(VOCABULARY) for _ in range(700)]
    for length in (0, 1, 100, BLOCK, 2 * BLOCK, 5 * BLOCK, 5 * BLOCK + 1, 700):
        prompts += [stem[:length] + [chance.choice(VOCABULARY) for _ in range(n)] for n in (1, 60, 68, 200)]
    repeats = [chance.choice(prompts) for _ in range(40)]
    return prompts + repeats


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts and vLLM's offline answers."""
    folder: Path = tmp_path_factory.mktemp("reference")
    prompts = _prompts()
    job = {"model": str(demo_model_path()), "dtype": "float32", "max_model_len": 4096}
    (folder / "in.json").write_text(json.dumps(job | {"max_tokens": MAX_TOKENS, "prompts": prompts}))
    command = [sys.executable, "-m", "tests.support.offline_reference", folder / "in.json", folder / "out.json"]
    environment = os.environ | CPU_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run(command, check=True, env=environment, timeout=600, capture_output=True)
    return prompts, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("queue", ["redis", "kafka"])
def test_prefill_decode_equals_offline(
    stack: RunningStack, reference: tuple[list[list[int]], list[list[int]]], queue: str
) -> None:
    prompts, expected = reference
    assert len(prompts) >= 200
    answers = asyncio.run(_ask_all(stack.urls[queue], stack.model, prompts))
    different = [
        (len(prompt), got, want) for prompt, got, want in zip(prompts, answers, expected, strict=True) if got != want
    ]
    assert not different, f"{len(different)} of {len(prompts)} differ; (prompt length, got, expected): {different[:3]}"


async def _ask_all(url: str, model: str, prompts: list[list[int]]) -> list[list[int]]:
    slots = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def ask(prompt: list[int]) -> list[int]:
            body = {
                "model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True,
            }  # fmt: skip
            async with slots:
                answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
            return token_ids

        return list(await asyncio.gather(*map(ask, prompts)))
