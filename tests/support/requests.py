"""Records to send through queues and engines."""

from __future__ import annotations

import itertools
from typing import Any

from penstock.queue.records import (
    PriorityClass,
    Record,
    new_request_id,
    now_ms,
    pack_tokens,
    prefix_hashes,
)

_tokens = itertools.cycle(range(50_000))


def make_record(prompt: list[int] | int = 5, *, sampling: dict[str, Any] | None = None, **fields: Any) -> Record:
    """A record whose prompt is given, or has that many tokens and differs from every other's; with a ``cache_salt`` no
    prefix cache knows it."""
    request_id = fields.pop("id", None) or new_request_id()
    tokens = prompt if isinstance(prompt, list) else [next(_tokens) for _ in range(prompt)]
    packed = pack_tokens(tokens)
    values: dict[str, Any] = {
        "id": request_id,
        "model": "m",
        "pool": "default",
        "release": "r0",
        "tenant": "acme",
        "priority_class": PriorityClass.STANDARD,
        "num_tokens": len(tokens),
        "prompt": packed,
        "sampling": {"max_tokens": 4} if sampling is None else sampling,
        "reply_to": "ingress:test",
        "accepted_ms": now_ms(),
        "prefix_hashes": prefix_hashes(packed, fields.get("cache_salt") or "acme"),
    }
    return Record(**values | fields)
