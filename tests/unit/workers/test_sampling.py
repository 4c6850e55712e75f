"""When another engine may go on from the tokens alone, and with which parameters."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.workers.sampling import continuable, for_prefill, remaining

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 9, "stop_token_ids": [2]},
        {"seed": None, "repetition_penalty": 1.0, "presence_penalty": 0.0, "bad_words": [], "min_tokens": 0},
        {"logprobs": 5, "logit_bias": {1: 2.0}, "ignore_eos": True},
    ],
)
def test_plain_sampling_continues(sampling: dict[str, Any]) -> None:
    assert continuable(sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 0},
        {"seed": 7},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.1},
        {"min_tokens": 1},
        {"bad_words": ["x"]},
        {"structured_outputs": {"json": "{}"}},
        {"extra_args": {"x": 1}},
    ],
)
def test_sampling_with_a_past_does_not(sampling: dict[str, Any]) -> None:
    assert not continuable(sampling)


def test_nothing_emitted_changes_nothing() -> None:
    sampling = {"max_tokens": 5, "prompt_logprobs": 1}
    assert remaining(sampling, 0) == sampling


def test_limits_shrink_by_what_was_emitted() -> None:
    sampling = {"max_tokens": 5, "min_tokens": 2, "prompt_logprobs": 1, "top_p": 0.5}
    assert remaining(sampling, 3) == {"max_tokens": 2, "min_tokens": 0, "top_p": 0.5}
    assert sampling["max_tokens"] == 5


@pytest.mark.parametrize("sampling", [{}, {"max_tokens": None}])
def test_the_default_limit_shrinks_too(sampling: dict[str, Any]) -> None:
    assert remaining(sampling, 10) == {"max_tokens": 6}


def test_prefill_makes_one_token() -> None:
    sampling = {"max_tokens": 50, "min_tokens": 9, "structured_outputs": {"json": "{}"}, "temperature": 0.2}
    assert for_prefill(sampling) == {"max_tokens": 1, "temperature": 0.2}
