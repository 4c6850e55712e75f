"""Validation of a batch's input while it is uploaded, so that a batch of any size starts at once.

16 bytes a line are kept until the end, where duplicate ids are found; everything else is decided line by line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

import msgspec

from penstock.serving.batches.lines import BadLine, Envelope, LineSplitter, Problem, RawLine, read_envelope

MAX_PROBLEMS = 100
"""Problems that are kept, the first ones; there may be one a line."""
DIGEST_BYTES = 16
"""Of a custom id: at a million lines two different ones are alike with a probability of 1e-27."""


class Inspection(msgspec.Struct, kw_only=True):
    """What a file holds. ``url`` and ``model`` are those of the first readable line, which the others must share.

    ``complete``: every line was looked at. It is not worth the time in a file that is too long, or bad all over.
    """

    lines: int = 0
    problems: list[Problem] = []
    complete: bool = True
    url: str | None = None
    model: str | None = None
    first_line: int | None = None


class Inspector:
    """``feed`` the content, then ``finish``."""

    def __init__(self, max_line_bytes: int, max_lines: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._max_lines = max_lines
        self._splitter = LineSplitter(max_line_bytes)
        self._digests = bytearray()
        self._found = Inspection()

    def feed(self, data: bytes) -> None:
        """The next piece of content."""
        if self._found.complete:
            self._look(self._splitter.feed(data))
        else:
            self._found.lines += data.count(b"\n")

    def finish(self) -> Inspection:
        """The verdict over the whole file."""
        self._look(self._splitter.finish())
        duplicates = [
            Problem("duplicate_custom_id", f"The custom_id of line {first + 1} is used again.", again + 1, "custom_id")
            for first, again in islice(_duplicates(bytes(self._digests)), MAX_PROBLEMS)
        ]
        problems = sorted(self._found.problems + duplicates, key=lambda problem: problem.line or 0)
        self._found.problems = problems[:MAX_PROBLEMS]
        return self._found

    def _look(self, lines: Iterator[RawLine]) -> None:
        found = self._found
        for line in lines:
            found.lines += 1
            if found.complete:
                self._look_at(line)
                found.complete = len(found.problems) < MAX_PROBLEMS and found.lines <= self._max_lines

    def _look_at(self, line: RawLine) -> None:
        try:
            key = self._check(line).custom_id.encode()
        except BadLine as error:
            self._found.problems.append(Problem(error.code, error.message, line.at + 1, error.param))
            key = b"\xff%d" % line.at  # no UTF-8, so nobody's custom id
        self._digests += hashlib.blake2b(key, digest_size=DIGEST_BYTES).digest()

    def _check(self, line: RawLine) -> Envelope:
        if line.data is None:
            raise BadLine("line_too_long", f"This line is over the limit of {self._max_line_bytes} bytes.")
        envelope, found = read_envelope(line.data), self._found
        if found.first_line is None:
            found.url, found.model, found.first_line = envelope.url, envelope.body.model, line.at + 1
        _check_request(envelope, found)
        return envelope


def _check_request(envelope: Envelope, first: Inspection) -> None:
    if not envelope.custom_id:
        raise BadLine("missing_required_parameter", "Missing required parameter: 'custom_id'.", "custom_id")
    if envelope.method != "POST":
        raise BadLine("invalid_method", "The method must be 'POST'.", "method")
    if envelope.url != first.url:
        raise BadLine("url_mismatch", f"The url differs from that of line {first.first_line}.", "url")
    if envelope.body.model != first.model:
        raise BadLine("model_mismatch", f"The model differs from that of line {first.first_line}.", "body.model")
    if envelope.body.stream:
        raise BadLine("invalid_request", "Answers in a batch cannot be streamed.", "body.stream")


def _duplicates(digests: bytes) -> Iterator[tuple[int, int]]:
    """Pairs of the first line with an id and a later one, by sorting: no table of a million ids is built."""
    import numpy as np  # an eighth of a second, which `penstock --help` has not got

    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal ids stay in the order of their lines
    in_order = halves[order]
    first = 0
    for position in np.flatnonzero((in_order[1:] == in_order[:-1]).all(axis=1)) + 1:
        if not (first and (in_order[position] == in_order[first]).all()):
            first = position - 1
        yield int(order[first]), int(order[position])
