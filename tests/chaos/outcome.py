"""What a row of the report says, and how large a row is played."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Scale(StrEnum):
    """How long a round is: seconds in ``make test``, a minute in the short one; the long one is what is claimed."""

    TEST = "test"
    SHORT = "short"
    LONG = "long"


class Size(msgspec.Struct, frozen=True):
    """Faults to inject, streams open at a time, tokens an answer, requests in all (0: as many as it takes)."""

    faults: int
    streams: int
    tokens: int = 64
    requests: int = 0
    seconds: float = 0.0


class Check(msgspec.Struct, frozen=True):
    """One thing that must hold; ``invariant`` names those of docs/reliability.md it shows, if any."""

    invariant: str
    what: str
    holds: bool
    found: str = ""


class Outcome(msgspec.Struct):
    """One row. ``requests`` were accepted, ``finished`` came to their proper end.

    ``lost``, ``repeated`` and ``altered`` are tokens as clients saw them. ``gap_p95_s`` is the longest silence inside a
    stream, over the streams that were run again (all, when none was).
    """

    row: str
    fault: str
    seed: int
    scale: Scale
    engine: str
    injected: int = 0
    requests: int = 0
    finished: int = 0
    lost: int = 0
    repeated: int = 0
    altered: int = 0
    gap_p95_s: float = 0.0
    reexecuted: float = 0.0
    seconds: float = 0.0
    errors: dict[str, int] = msgspec.field(default_factory=dict)
    figures: dict[str, float] = msgspec.field(default_factory=dict)
    checks: list[Check] = msgspec.field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """What did not hold."""
        return [check for check in self.checks if not check.holds]

    def check(self, invariant: str, what: str, holds: bool, found: object = "") -> None:
        """Note whether something holds."""
        self.checks.append(Check(invariant, what, holds, "" if holds else str(found)))
