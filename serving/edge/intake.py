"""Everything Penstock must know of a request before vLLM's handlers run: class, deadline, tags and trace.

OpenAI's ``service_tier`` chooses the priority class: ``priority`` is interactive, ``default`` and ``auto``
(also absent, and Anthropic's ``standard_only``) standard, ``flex`` batch. The deadline is the header
``X-Request-Timeout-Ms``; else what the OpenAI SDK for Python says it waits for, where that is the time for
the whole answer; else the default of the class, which also is the most a client can ask for.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from penstock.queue.errors import RequestError
from penstock.queue.records import PriorityClass, now_ms
from penstock.serving.context import RequestContext, enter
from penstock.serving.edge.asgi import App, Receive, Scope, Send, header, is_json
from penstock.serving.edge.body import DisconnectedError, read_body, replay
from penstock.serving.edge.exchange import Exchange, exchange_of
from penstock.serving.errors import InvalidField
from penstock.serving.request import COMPLETIONS, RESPONSES, ClientRequest
from penstock.serving.settings import IngressSettings

TIERS = {
    "priority": PriorityClass.INTERACTIVE,
    "default": PriorityClass.STANDARD,
    "auto": PriorityClass.STANDARD,
    "standard_only": PriorityClass.STANDARD,
    "flex": PriorityClass.BATCH,
}
MAX_TAGS = 16
"""OpenAI's limits for ``metadata``: 16 pairs, keys of 64 and values of 512 characters."""
MAX_TAG_KEY = 64
MAX_TAG_VALUE = 512
MAX_TRACESTATE = 512
"""What the W3C Trace Context asks every participant to carry at least."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_PATH_OF_FIELD = re.compile(r" - at `\$\.?(?P<param>[^`]*)`$")


class Peek(msgspec.Struct):
    """The few fields of a body that Penstock reads itself; the rest is only checked to be JSON."""

    model: str | None = None
    stream: bool | None = None
    service_tier: str | None = None
    metadata: dict[str, str | None] | None = None
    n: msgspec.Raw = msgspec.Raw(b"1")
    prompt: msgspec.Raw = msgspec.Raw(b'""')
    background: bool | None = None
    store: bool | None = None


T = TypeVar("T")
_peek = msgspec.json.Decoder(Peek)


class Intake:
    """Sets the :class:`RequestContext` and hands the body on."""

    def __init__(self, app: App, settings: IngressSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        if exchange.caller is None or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        try:
            body = await read_body(scope, receive, self._settings.max_body_bytes)
        except DisconnectedError:
            return None
        request = self._request(scope, exchange, body)
        exchange.priority_class, exchange.model = request.priority_class, request.model
        enter(RequestContext(request, exchange.outcome))
        return await self._app(scope, replay(body, receive), send)

    def _request(self, scope: Scope, exchange: Exchange, body: bytes) -> ClientRequest:
        peek = read_peek(body) if is_json(scope) else Peek()  # vLLM refuses other types in its own words
        priority_class = read_tier(peek.service_tier)
        n = read_n(peek.n)
        assert exchange.caller is not None
        return ClientRequest(
            tenant=exchange.caller.tenant,
            key_id=exchange.caller.id,
            priority_class=priority_class,
            external_id=exchange.request_id,
            deadline_ms=now_ms() + self._patience_ms(scope, priority_class, bool(peek.stream)),
            path=scope["path"],
            body=body,
            content_type=header(scope, b"content-type") or "",
            model=peek.model,
            stream=bool(peek.stream),
            tags=read_tags(peek.metadata),
            trace=read_trace(scope),
            n=n,
            choices=n * count_prompts(peek.prompt) if scope["path"] == COMPLETIONS else n,
            background=bool(peek.background) and scope["path"] == RESPONSES,
            store=peek.store is not False,
        )

    def _patience_ms(self, scope: Scope, priority_class: PriorityClass, stream: bool) -> int:
        limit = self._settings.deadline_s[priority_class] * 1000
        return min(limit, asked_ms(scope, stream) or limit)


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The body as the decoder's type.

    Raises:
        RequestError: the body is not JSON.
        InvalidField: it is no object, or a field has the wrong type.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        place = _PATH_OF_FIELD.search(str(error))
        param = place["param"] if place else None
        raise InvalidField(f"Invalid request body: {error}", param or None) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"The request body is not valid JSON: {error}") from error


def read_peek(body: bytes) -> Peek:
    """The fields of :class:`Peek`. Raises as :func:`decode_body`."""
    return decode_body(_peek, body)


def read_tier(tier: str | None) -> PriorityClass:
    """The priority class of a ``service_tier``. Raises :class:`InvalidField` for a tier that does not
    exist.
    """
    try:
        return TIERS[tier or "auto"]
    except KeyError:
        raise InvalidField(f"Unknown service_tier {tier!r}; known: {', '.join(TIERS)}.", "service_tier") from None


def read_n(n: msgspec.Raw) -> int:
    """How many answers a prompt gets. What is no number is left for vLLM to refuse."""
    text = bytes(n)
    return max(1, int(text)) if text.isdigit() and len(text) < 6 else 1


def count_prompts(prompt: msgspec.Raw) -> int:
    """How many prompts a completion has: a list of texts or of token lists has several, a list of tokens is one."""
    if bytes(memoryview(prompt)[:1]) != b"[":  # a text of megabytes is not to be copied for this
        return 1
    prompts = msgspec.json.decode(prompt)
    return len(prompts) if prompts and isinstance(prompts[0], str | list | dict) else 1


def read_tags(metadata: dict[str, str | None] | None) -> dict[str, str]:
    """The request's ``metadata``. Raises :class:`InvalidField` when it is over OpenAI's limits."""
    tags = {key: value for key, value in (metadata or {}).items() if value is not None}
    if len(tags) > MAX_TAGS or any(len(k) > MAX_TAG_KEY or len(v) > MAX_TAG_VALUE for k, v in tags.items()):
        raise InvalidField(
            f"metadata: at most {MAX_TAGS} pairs, keys to {MAX_TAG_KEY}, values to {MAX_TAG_VALUE} letters.",
            "metadata",
        )
    return tags


def read_trace(scope: Scope) -> dict[str, str]:
    """The W3C trace context; empty when there is none or it is malformed, as the standard asks."""
    parent = header(scope, b"traceparent")
    if parent is None or not _TRACEPARENT.fullmatch(parent):
        return {}
    state = header(scope, b"tracestate")
    return {"traceparent": parent} | ({"tracestate": state} if state and len(state) <= MAX_TRACESTATE else {})


def asked_ms(scope: Scope, stream: bool) -> int | None:
    """Milliseconds the client gives us, or None.

    A read timeout bounds the silence on a stream, which keep-alives break, and not its length: it counts
    for whole answers only. Raises :class:`InvalidField` for a header that is no positive integer.
    """
    asked = header(scope, b"x-request-timeout-ms")
    if asked is not None:
        if not asked.isdecimal() or not int(asked):
            raise InvalidField("X-Request-Timeout-Ms must be a positive integer.", "x-request-timeout-ms")
        return int(asked)
    waits = header(scope, b"x-stainless-read-timeout") or ""
    seconds = float(waits) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", waits) else 0.0
    return None if stream else int(seconds * 1000) or None
