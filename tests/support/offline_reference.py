"""vLLM's own offline answer to a list of prompts: ``python -m tests.support.offline_reference IN.json OUT.json``.

A process of its own, for an engine of vLLM's cannot be taken down inside a test session.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answers(job: dict[str, Any]) -> list[list[int]]:
    """Greedy token ids for each of ``job["prompts"]``; ``job`` also has model, dtype, max_model_len and max_tokens.

    One prompt at a time, without a prefix cache: the plainest computation there is.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], enforce_eager=True,
        enable_prefix_caching=False, max_num_seqs=1,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    return [list(answer.outputs[0].token_ids) for answer in engine.generate(prompts, sampling, use_tqdm=False)]


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(answers(json.loads(source.read_text()))))
