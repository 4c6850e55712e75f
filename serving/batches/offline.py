"""Checking an input file without a server, by the rules the server goes by."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from penstock.serving.batches.inspection import Inspector
from penstock.serving.batches.lines import BOM, BadLine, Problem, read_envelope
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.batches.validation import problems_of

PIECE_BYTES = 1024 * 1024


def endpoint_of(path: Path) -> str:
    """The url of the first line, however long it is; empty when it cannot be read."""
    with path.open("rb") as file, suppress(BadLine):
        return read_envelope(file.readline().removeprefix(BOM)).url
    return ""


def check(path: Path, endpoint: str, model: str, settings: BatchSettings) -> tuple[int, list[Problem], str]:
    """Lines of the file, what is wrong with it, and its endpoint; empty ``endpoint`` and ``model`` mean the file's."""
    inspector = Inspector(settings.max_line_bytes, settings.max_lines)
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            inspector.feed(piece)
    found = inspector.finish()
    url = endpoint or found.url or ""
    problems = problems_of(found, endpoint=url, model=model or found.model or "", max_lines=settings.max_lines)
    return found.lines, problems, url
