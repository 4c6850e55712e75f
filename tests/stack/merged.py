"""What a client has made of a stream at its end, whatever the pieces it came in."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

JSON = dict[str, Any]
PLACES = 2
"""Of log probabilities that are compared: they are computed in batches of another shape after a death."""


def merged(events: list[JSON]) -> JSON:
    """Text, reasoning, calls, log probabilities and ends by choice, and the usage."""
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: defaultdict(str))
    usage: JSON = {}
    for event in events:
        usage |= _usage(event)
        for choice in event.get("choices", ()):
            _add(choices[choice["index"]], choice)
        if text := event.get("delta"):
            _add(choices[0], {"delta": text} if isinstance(text, dict) else {"text": text})
    return {"choices": {index: dict(found) for index, found in choices.items()}, "usage": usage}


def _add(found: dict[str, Any], choice: JSON) -> None:
    delta = choice.get("delta") or {}
    found["text"] += choice.get("text") or delta.get("content") or delta.get("text") or ""
    found["reasoning"] += delta.get("reasoning") or ""
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        found[f"call {call['index']}"] += (function.get("name") or "") + (function.get("arguments") or "")
    for name in ("finish_reason", "stop_reason"):
        if (end := choice.get(name) or delta.get(name)) is not None:
            found[name] = end
    for token in (choice.get("logprobs") or {}).get("content") or ():
        found["logprobs"] = [*(found["logprobs"] or ()), (token["token"], round(token["logprob"], PLACES))]


def _usage(event: JSON) -> JSON:
    """Counts of tokens; how many of them were cached is another matter."""
    found = event.get("usage") or (event.get("response") or {}).get("usage") or {}
    return {name: count for name, count in found.items() if isinstance(count, int)}


def events_of(lines: list[str]) -> list[JSON]:
    """The data of an event stream."""
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
