"""Batch jobs: their limits, and how much of them one ingress works on at a time."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from penstock.queue.settings import Section


class BatchSettings(Section):
    """Batch jobs of one ingress."""

    section = "batches"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_BATCHES_", extra="forbid", frozen=True)

    coordinate: bool = Field(default=True, description="Whether this ingress works on batches, or only takes them in.")
    max_lines: int = Field(default=50_000, ge=1, description="Lines of an input file.")
    max_line_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, description="Longest line of an input file.")
    in_flight: int = Field(default=256, ge=1, description="Lines under way at once, over all batches of this ingress.")
    max_coordinators: int = Field(default=64, ge=1, description="Batches this ingress works on at once.")
    max_per_tenant: int = Field(default=16, ge=1, description="... of one tenant.")
    look_ahead_lines: int = Field(default=4096, ge=1, description="Lines that are put in order of their prompts.")
    look_ahead_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, description="... and their bytes at most.")
    max_attempts: int = Field(default=5, ge=1, description="Tries of a line that fails by an engine's fault.")
    urgent_share: float = Field(
        default=0.1, ge=0, le=1, description="Last part of the window in which a batch is urgent."
    )
    retention_s: int = Field(default=2_592_000, ge=60, description="How long an ended batch can be retrieved; 30 days.")
