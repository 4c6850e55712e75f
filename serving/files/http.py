"""What the HTTP side of files and batches have in common."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import msgspec

from penstock.queue.errors import RequestError
from penstock.serving.edge.asgi import Scope, Send, send_json
from penstock.serving.edge.exchange import exchange_of
from penstock.serving.errors import InvalidField

MIN_EXPIRY_S = 3600
MAX_EXPIRY_S = 2_592_000
"""OpenAI's bounds of ``expires_after`` and ``output_expires_after``: an hour and 30 days."""


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"
    status = 405


def query(scope: Scope) -> dict[str, str]:
    """The query's parameters; of one given twice the last."""
    return dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))


def tenant_of(scope: Scope) -> str:
    """Whose request this is; the edge has made sure that there is a caller."""
    caller = exchange_of(scope).caller
    assert caller is not None
    return caller.tenant


def limit_of(given: str | None, default: int, highest: int) -> int:
    """The query's ``limit``. Raises :class:`InvalidField` when it is no number from 1 to ``highest``."""
    if given is None:
        return default
    if not given.isdecimal() or not 1 <= int(given[:9]) <= highest:
        raise InvalidField(f"limit must be a number from 1 to {highest}.", "limit")
    return int(given)


def expiry_of(anchor: str | None, seconds: int | str | None, param: str, default_s: int) -> int:
    """Seconds until a file expires. Raises :class:`InvalidField` for another anchor or seconds out of bounds."""
    if anchor is None and seconds is None:
        return default_s
    if anchor != "created_at":
        raise InvalidField(f"{param}.anchor must be 'created_at'.", f"{param}.anchor")
    number = int(seconds) if seconds is not None and str(seconds).isdecimal() and len(str(seconds)) < 10 else 0
    if not MIN_EXPIRY_S <= number <= MAX_EXPIRY_S:
        raise InvalidField(f"{param}.seconds must be from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}.", f"{param}.seconds")
    return number


async def send_object(send: Send, value: Any) -> None:
    """Answer 200 with ``value`` as JSON."""
    await send_json(send, 200, msgspec.json.encode(value))


async def send_list(send: Send, objects: list[dict[str, Any]], has_more: bool) -> None:
    """Answer with OpenAI's list object."""
    ends = (
        {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {"first_id": None, "last_id": None}
    )
    await send_object(send, {"object": "list", "data": objects, **ends, "has_more": has_more})
