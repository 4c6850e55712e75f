"""What sampling parameters mean for continuing a request in another engine."""

from __future__ import annotations

from typing import Any

from penstock.queue.records import DEFAULT_MAX_TOKENS

_STATEFUL = (
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "bad_words",
    "structured_outputs",
    "thinking_token_budget",
    "repetition_detection",
    "extra_args",
)
"""With seeds and repetition penalties, the parameters whose effect depends on which tokens were *output*, or on the
position of a random generator; an engine cannot tell either from prompt + emitted tokens."""


def continuable(sampling: dict[str, Any]) -> bool:
    """Whether generating on from prompt + emitted tokens gives what the first engine would have given.

    ``sampling`` holds parameters by name without those at their default.
    """
    if sampling.get("seed") is not None or sampling.get("repetition_penalty", 1.0) != 1.0:
        return False
    return not any(sampling.get(name) for name in _STATEFUL)


def remaining(sampling: dict[str, Any], emitted: int) -> dict[str, Any]:
    """The same parameters for an engine that sees ``emitted`` output tokens as part of its prompt."""
    if not emitted:
        return sampling
    rest = dict(sampling)
    rest.pop("prompt_logprobs", None)
    limit = rest.get("max_tokens")
    rest["max_tokens"] = (DEFAULT_MAX_TOKENS if limit is None else limit) - emitted
    if rest.get("min_tokens"):
        rest["min_tokens"] = max(0, rest["min_tokens"] - emitted)
    return rest


def for_prefill(sampling: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the prefill pool's share: one token, without what only matters for later ones."""
    rest = {name: value for name, value in sampling.items() if name not in ("min_tokens", "structured_outputs")}
    rest["max_tokens"] = 1
    return rest
