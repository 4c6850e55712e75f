"""``multipart/form-data``, piece by piece: the file's content passes through, everything else must be small."""

from __future__ import annotations

import re
from urllib.parse import unquote

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from penstock.queue.errors import RequestError
from penstock.serving.errors import InvalidField

MAX_FIELD_BYTES = 4096
"""A field's value; OpenAI's are words and numbers."""
MAX_PARTS = 32
MAX_FILENAME = 255
"""As on common file systems; the name is shown, never used as a path."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Form:
    """An upload as it arrives. :meth:`feed` gives the part of the file's content that came with a piece."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidField("Send the file as multipart/form-data, with a boundary.", "content-type")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ended = False
        self._content: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._field: tuple[str, bytearray] | None = None
        self._parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> bytes:
        """Read on. Raises :class:`RequestError` for what is no form, or one with too much in it."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise RequestError(f"The request body is not multipart/form-data: {error}") from error
        content, self._content = b"".join(self._content), []
        return content

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestError(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != "file":
            self._field = name, bytearray()
            return
        if self.filename is not None:
            raise InvalidField("Send one file.", "file")
        self._field = None
        self.filename = clean_filename(_raw_filename(self._headers, options))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._content.append(data[start:end])
            return
        name, value = self._field
        value += data[start:end]
        if len(value) > MAX_FIELD_BYTES:
            raise InvalidField(f"The field is longer than {MAX_FIELD_BYTES} bytes.", name[:100])

    def _part_end(self) -> None:
        if self._field is not None:
            name, value = self._field
            self.fields[name] = value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True


def _raw_filename(headers: dict[bytes, bytes], options: dict[bytes, bytes]) -> str:
    """The name as it was sent: the parser cuts paths itself, in its own way, and may or may not decode RFC 5987's."""
    name = options.get(b"filename", b"").decode("utf-8", "replace")
    return unquote(name) if b"filename*" in headers.get(b"content-disposition", b"") else name


def clean_filename(name: str) -> str:
    """The last part of a path of any system, printable, and never empty."""
    last = re.split(r"[/\\]", _CONTROL.sub("", name))[-1].strip()
    return "upload" if last in {"", ".", ".."} else last[:MAX_FILENAME]
