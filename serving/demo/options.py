"""What ``penstock demo`` was asked for."""

from __future__ import annotations

from typing import Literal

import msgspec


class DemoOptions(msgspec.Struct, frozen=True):
    """``model``: folder or hub name, empty for the bundled demo model. ``port``: of the ingress, 0 for a
    free one.
    """

    queue: Literal["redis", "kafka"] = "redis"
    model: str = ""
    prompt: str = "What is Penstock?"
    once: bool = False
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    port: int = 0

    @property
    def engines(self) -> dict[str, int]:
        """Replicas by role; mixed ones stand in for prefill and decode."""
        counts = {"mixed": self.mixed} if self.mixed else {"prefill": self.prefill, "decode": self.decode}
        return {role: count for role, count in counts.items() if count}
