"""What the parts say in their logs: structured events, and the innermost cause of a failure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TAIL_LINES = 15
_EXCEPTION = re.compile(r"^(?:\([^)]*\) )?(?P<line>(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?)$")
_PENSTOCK = re.compile(r"^penstock: (?P<line>.+)$")


class LogFollower:
    """Reads a growing log; :meth:`events` returns the JSON events seen so far by name, the last of each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._seen: dict[str, dict[str, Any]] = {}

    def events(self) -> dict[str, dict[str, Any]]:
        """Read on and return the last event of every name."""
        for line in self._new_lines():
            if (event := parse_event(line)) is not None:
                self._seen[event["event"]] = event
        return self._seen

    def _new_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


def parse_event(line: str) -> dict[str, Any] | None:
    """The structured event in a line, which Ray may have put its prefix before; None if there is none."""
    start, end = line.find("{"), line.rfind("}")
    try:
        event = json.loads(line[start : end + 1]) if 0 <= start < end else None
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def cause_of_death(log: Path) -> str:
    """Why the process of this log ended: what it said itself, else the first exception, which caused the
    others.
    """
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    failures = [event for line in lines if (event := parse_event(line)) and event["event"] == "engine_failed"]
    if failures:
        return str(failures[0].get("cause"))
    for pattern in (_PENSTOCK, _EXCEPTION):
        if found := next((match for line in lines if (match := pattern.match(line))), None):
            return found["line"]
    return "\n".join(lines[-TAIL_LINES:]) or "it ended without a word"
