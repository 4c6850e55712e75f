"""The lines of a batch's input: cut from a stream of bytes, and read one by one.

Error codes are OpenAI's where it has one: ``invalid_json_line``, ``missing_required_parameter``,
``duplicate_custom_id``, ``url_mismatch``, ``model_mismatch``, ``model_not_found``, ``empty_file``, ``too_many_tasks``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PLACE = re.compile(r" - at `\$\.?(?P<param>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


class Problem(msgspec.Struct, frozen=True):
    """What is wrong, as in the ``errors`` of OpenAI's batch object; ``line`` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BadLine(Exception):
    """A line that cannot be run."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class RawLine(NamedTuple):
    """``at`` is its place, from 0; ``data`` is None for a line over the limit, of which nothing is kept."""

    at: int
    data: bytes | None


class BodyHead(msgspec.Struct):
    """What a body is asked for before vLLM reads it."""

    model: str
    stream: bool | None = None


class Envelope(msgspec.Struct):
    """One line of the input, its body looked at."""

    custom_id: str
    method: str
    url: str
    body: BodyHead


class LineSplitter:
    """Cuts pieces of a stream into lines; memory is bounded by ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._index = 0

    def feed(self, data: bytes) -> Iterator[RawLine]:
        """The lines that end in this piece."""
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._extend(piece)
            yield self._end()
        self._extend(rest)

    def finish(self) -> Iterator[RawLine]:
        """The last line, if it has no line feed."""
        if self._size:
            yield self._end()

    def _extend(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max:
            self._parts = []
        elif piece:
            self._parts.append(piece)

    def _end(self) -> RawLine:
        data = b"".join(self._parts) if self._size <= self._max else None
        line = RawLine(self._index, data.removeprefix(BOM) if data and not self._index else data)
        self._parts, self._size, self._index = [], 0, self._index + 1
        return line


_envelope = msgspec.json.Decoder(Envelope)


def read_envelope(data: bytes) -> Envelope:
    """Read a line.

    Raises:
        BadLine: it is no JSON object of the right form.
    """
    try:
        data.decode()
        return _envelope.decode(data)
    except msgspec.ValidationError as error:
        raise _wrong_form(str(error)) from None
    except RecursionError:
        raise BadLine("invalid_json_line", "This line is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadLine("invalid_json_line", _why_unreadable(data, error)) from None


def _wrong_form(text: str) -> BadLine:
    place = _PLACE.search(text)
    inside = place["param"] if place else ""
    if missing := _MISSING.search(text):
        name = ".".join(filter(None, (inside, missing["name"])))
        return BadLine("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    if not place:
        return BadLine("invalid_json_line", "This line is not a JSON object.")
    return BadLine("invalid_type", f"Invalid type for '{inside}': {text[: place.start()]}.", inside)


def _why_unreadable(data: bytes, error: Exception) -> str:
    if not data.strip():
        return "This line is empty."
    if data.startswith(_UTF16) or b"\x00" in data[:8]:
        return "This line is not parseable as valid JSON: it looks like UTF-16; the file must be UTF-8."
    if isinstance(error, UnicodeDecodeError):
        return f"This line is not parseable as valid JSON: byte {error.start + 1} is not UTF-8."
    return f"This line is not parseable as valid JSON: {str(error).removeprefix('JSON is malformed: ')}."
