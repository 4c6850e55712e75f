"""``/v1/files``: upload, list, retrieve, content and delete, as OpenAI's clients use them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from penstock.queue.errors import PayloadTooLarge, RequestError
from penstock.queue.records import now_ms
from penstock.serving.edge.asgi import App, Headers, Receive, Scope, Send, header
from penstock.serving.edge.body import BODY_TIMEOUT_S, DisconnectedError
from penstock.serving.errors import BodyTimeout, InvalidField
from penstock.serving.files.catalog import FileCatalog, FileMeta, new_file_id
from penstock.serving.files.form import Form
from penstock.serving.files.http import MethodNotAllowed, expiry_of, limit_of, query, send_list, send_object, tenant_of
from penstock.serving.files.objects import ObjectMissing, Writer
from penstock.serving.files.settings import FilesSettings

PREFIX = "/v1/files"
PURPOSES = frozenset({"batch"})
"""What can be uploaded; ``batch_output`` is made here."""
MAX_PAGE = 10_000
FORM_OVERHEAD = 64 * 1024
"""Bytes of an upload that are not the file: boundaries, part headers and the other fields."""
_FILE = re.compile(r"/v1/files/(?P<id>[^/]+)(?P<content>/content)?")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Inspector(Protocol):
    """Looks at an upload while it passes."""

    def feed(self, data: bytes) -> None:
        """The next piece of content."""

    def finish(self) -> msgspec.Struct:
        """What was found out, to be kept with the file; may take a while."""


class RangeNotSatisfiable(RequestError):
    """The range begins behind the end of the file."""

    code = "range_not_satisfiable"
    status = 416


class FilesApp:
    """Serves the paths under :data:`PREFIX`; everything else goes to ``app``."""

    def __init__(
        self, app: App, catalog: FileCatalog, settings: FilesSettings, inspector: Callable[[], Inspector]
    ) -> None:
        self._app = app
        self._catalog = catalog
        self._settings = settings
        self._inspector = inspector

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == PREFIX and method == "POST":
            await self._upload(scope, receive, send)
        elif path == PREFIX and method == "GET":
            await self._list(scope, send)
        elif (place := _FILE.fullmatch(path)) is not None and method in {"GET", "DELETE"}:
            await self._one(scope, place, send)
        elif (path == PREFIX or place is not None) and method != "OPTIONS":
            raise MethodNotAllowed(f"{method} is not offered for {path}.")
        else:
            await self._app(scope, receive, send)

    async def _one(self, scope: Scope, place: re.Match[str], send: Send) -> None:
        meta = await self._catalog.find(tenant_of(scope), place["id"])
        if scope["method"] == "GET" and place["content"]:
            await self._content(scope, meta, send)
        elif scope["method"] == "GET":
            await send_object(send, meta.to_openai())
        elif place["content"]:
            raise MethodNotAllowed("Delete the file, not its content.")
        else:
            await self._catalog.delete(meta)
            await send_object(send, {"id": meta.id, "object": "file", "deleted": True})

    async def _list(self, scope: Scope, send: Send) -> None:
        asked = query(scope)
        order = asked.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise InvalidField("order must be 'asc' or 'desc'.", "order")
        files, has_more = await self._catalog.page(
            tenant_of(scope),
            purpose=asked.get("purpose"),
            after=asked.get("after"),
            limit=limit_of(asked.get("limit"), MAX_PAGE, MAX_PAGE),
            newest_first=order == "desc",
        )
        await send_list(send, [meta.to_openai() for meta in files], has_more)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._settings.max_upload_bytes
        announced = header(scope, b"content-length") or ""
        if announced.isdigit() and int(announced) > limit + FORM_OVERHEAD:
            raise _too_large(limit)
        form = Form(header(scope, b"content-type") or "")
        file_id, inspector = new_file_id(), self._inspector()
        try:
            async with self._catalog.objects.create(file_id) as writer:
                size = await _receive(receive, form, writer, inspector, limit)
                meta = self._describe(scope, form, file_id, size)
                found = await asyncio.to_thread(inspector.finish)
                await writer.commit()
        except DisconnectedError:
            return
        meta = msgspec.structs.replace(meta, inspection=msgspec.msgpack.encode(found))
        await self._catalog.add(meta)
        await send_object(send, meta.to_openai())

    def _describe(self, scope: Scope, form: Form, file_id: str, size: int) -> FileMeta:
        if not form.ended:
            raise RequestError("The request body ends in the middle of the form.")
        if form.filename is None:
            raise InvalidField("The form has no part called 'file'.", "file")
        if form.fields.get("purpose") not in PURPOSES:
            raise InvalidField("purpose must be 'batch'.", "purpose")
        anchor, seconds = (form.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        lasts_s = expiry_of(anchor, seconds, "expires_after", self._settings.expires_after_s)
        now = now_ms()
        return FileMeta(
            id=file_id,
            tenant=tenant_of(scope),
            filename=form.filename,
            purpose=form.fields["purpose"],
            size=size,
            created_ms=now,
            expires_ms=now + lasts_s * 1000,
        )

    async def _content(self, scope: Scope, meta: FileMeta, send: Send) -> None:
        start, end, partial = _range(header(scope, b"range"), meta.size)
        pieces = self._catalog.objects.read(meta.id, start, end)
        first = await _first(pieces, end - start)
        await send(
            {
                "type": "http.response.start",
                "status": 206 if partial else 200,
                "headers": _headers(meta, start, end, partial),
            }
        )
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _receive(receive: Receive, form: Form, writer: Writer, inspector: Inspector, limit: int) -> int:
    """Pass the file on to the store; returns its size in bytes."""
    size, more = 0, True
    while more:
        try:
            message = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
        except TimeoutError:
            raise BodyTimeout(f"nothing of the upload arrived for {BODY_TIMEOUT_S:.0f} s") from None
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        more = message.get("more_body", False)
        content = form.feed(message.get("body", b""))
        size += len(content)
        if size > limit:
            raise _too_large(limit)
        if content:
            inspector.feed(content)
            await writer.write(content)
    return size


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The file is over the limit of {limit} bytes.")


async def _first(pieces: AsyncIterator[bytes], expected: int) -> bytes:
    """The first piece, before a status is sent: content that is missing must not look like an empty file."""
    first = await anext(pieces, b"")
    if expected and not first:
        raise ObjectMissing("the file's content is not in the file store")
    return first


def _range(asked: str | None, size: int) -> tuple[int, int, bool]:
    """Start, end and whether it is a part. One range is served; anything else is ignored, as HTTP allows."""
    found = _RANGE.fullmatch(asked or "")
    if found is None or found[0] == "bytes=-":
        return 0, size, False
    if not found[1]:
        start, end = max(size - int(found[2]), 0), size
    else:
        start, end = int(found[1]), min(int(found[2] or size) + 1, size)
    if start >= size or start >= end:
        raise RangeNotSatisfiable(f"The file has {size} bytes.")
    return start, end, True


def _headers(meta: FileMeta, start: int, end: int, partial: bool) -> Headers:
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", str(end - start).encode()),
        (b"content-disposition", b'attachment; filename="' + meta.id.encode() + b'.jsonl"'),
        (b"accept-ranges", b"bytes"),
    ]
    return headers + ([(b"content-range", f"bytes {start}-{end - 1}/{meta.size}".encode())] if partial else [])
