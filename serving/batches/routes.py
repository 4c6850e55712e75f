"""``/v1/batches``: create, list, retrieve and cancel, as OpenAI's clients use them."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from penstock.queue.errors import RequestError
from penstock.queue.records import now_ms
from penstock.serving.batches.model import Batch, BatchSpec, Status, new_batch_id
from penstock.serving.batches.store import BatchStore
from penstock.serving.edge.asgi import App, Receive, Scope, Send
from penstock.serving.edge.body import DisconnectedError, read_body
from penstock.serving.edge.exchange import exchange_of
from penstock.serving.edge.intake import decode_body, read_tags
from penstock.serving.errors import InvalidField
from penstock.serving.files.catalog import FileCatalog, FileMeta
from penstock.serving.files.http import MethodNotAllowed, expiry_of, limit_of, query, send_list, send_object, tenant_of
from penstock.serving.request import CHAT, COMPLETIONS, RESPONSES

PREFIX = "/v1/batches"
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES)
MAX_BODY_BYTES = 64 * 1024
"""16 pairs of metadata at their longest are 9,216 characters."""
MIN_WINDOW_S = 3600
MAX_WINDOW_S = 7 * 86_400
_UNITS = {"h": 3600, "d": 86_400}
_WINDOW = re.compile(r"(\d{1,4})([hd])")
_BATCH = re.compile(r"/v1/batches/(?P<id>[^/]+)(?P<cancel>/cancel)?")


class CannotCancel(RequestError):
    """The batch has ended, or is about to."""

    code = "batch_not_cancellable"
    status = 409


class _Expiry(msgspec.Struct):
    anchor: str | None = None
    seconds: int | None = None


class _Create(msgspec.Struct):
    input_file_id: Annotated[str, msgspec.Meta(max_length=100)]
    endpoint: str
    completion_window: str
    metadata: dict[str, str | None] | None = None
    output_expires_after: _Expiry | None = None


_create = msgspec.json.Decoder(_Create)


class BatchesApp:
    """Serves the paths under :data:`PREFIX`; everything else goes to ``app``."""

    def __init__(self, app: App, store: BatchStore, catalog: FileCatalog, output_expires_after_s: int) -> None:
        self._app = app
        self._store = store
        self._catalog = catalog
        self._output_expires_after_s = output_expires_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        place = _BATCH.fullmatch(path)
        if path == PREFIX and method == "POST":
            await self._create(scope, receive, send)
        elif path == PREFIX and method == "GET":
            await self._list(scope, send)
        elif place is not None and method == ("POST" if place["cancel"] else "GET"):
            batch = await self._store.find(tenant_of(scope), place["id"])
            await send_object(send, (await self._cancel(batch) if place["cancel"] else batch).to_openai())
        elif (path == PREFIX or place is not None) and method != "OPTIONS":
            raise MethodNotAllowed(f"{method} is not offered for {path}.")
        else:
            await self._app(scope, receive, send)

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            asked = read_create(await read_body(scope, receive, MAX_BODY_BYTES))
        except DisconnectedError:
            return
        spec = self._spec(scope, asked)
        await self._input(spec)  # what is not the caller's own is neither kept nor, by the unpinning, removed
        await self._catalog.pin(spec.input_file_id, spec.id)
        try:
            found = await self._input(spec)
            batch = await self._store.create(spec, found.inspection)
        except RequestError:
            await self._catalog.unpin(spec.input_file_id, spec.id)
            raise
        await send_object(send, batch.to_openai())

    def _spec(self, scope: Scope, asked: _Create) -> BatchSpec:
        caller, created_ms = exchange_of(scope).caller, now_ms()
        assert caller is not None
        policy = asked.output_expires_after or _Expiry()
        return BatchSpec(
            id=new_batch_id(),
            tenant=caller.tenant,
            key_id=caller.id,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_ms=created_ms,
            expires_ms=created_ms + window_s(asked.completion_window) * 1000,
            metadata=None if asked.metadata is None else read_tags(asked.metadata),
            output_expires_after_s=expiry_of(
                policy.anchor, policy.seconds, "output_expires_after", self._output_expires_after_s
            ),
        )

    async def _input(self, spec: BatchSpec) -> FileMeta:
        found = await self._catalog.find(spec.tenant, spec.input_file_id)
        if found.purpose != "batch":
            raise InvalidField("The input file's purpose must be 'batch'.", "input_file_id")
        return found

    async def _list(self, scope: Scope, send: Send) -> None:
        asked = query(scope)
        limit = limit_of(asked.get("limit"), 20, 100)
        batches, has_more = await self._store.page(tenant_of(scope), after=asked.get("after"), limit=limit)
        await send_list(send, [batch.to_openai() for batch in batches], has_more)

    async def _cancel(self, batch: Batch) -> Batch:
        """Asking twice is fine; its coordinator does the rest."""
        may = (Status.VALIDATING, Status.IN_PROGRESS)
        had = await self._store.transition(batch.spec.id, may, Status.CANCELLING)
        if had not in (*may, Status.CANCELLING, Status.CANCELLED):
            raise CannotCancel(f"Cannot cancel a batch with status '{had}'.")
        return await self._store.find(batch.spec.tenant, batch.spec.id)


def read_create(body: bytes) -> _Create:
    """The body of a creation. Raises :class:`RequestError`, with the field's name where one is at fault."""
    asked = decode_body(_create, body)
    if asked.endpoint == "/v1/embeddings":
        raise InvalidField("No pool of this deployment serves /v1/embeddings.", "endpoint")
    if asked.endpoint not in ENDPOINTS:
        raise InvalidField(f"endpoint must be one of {', '.join(ENDPOINTS)}.", "endpoint")
    return asked


def window_s(text: str) -> int:
    """Seconds of a window such as ``24h`` or ``7d``. Raises :class:`InvalidField`."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise InvalidField("completion_window must be from '1h' to '7d', in hours or days.", "completion_window")
    return seconds
