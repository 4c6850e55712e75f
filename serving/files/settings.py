"""Where files are kept and for how long."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from penstock.queue.settings import Section


class FilesSettings(Section):
    """The file store; every ingress must reach the same one."""

    section = "files"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_FILES_", extra="forbid", frozen=True)

    root: str = Field(default="~/.penstock/files", min_length=1, description="A folder, or a URL such as s3://BUCKET.")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of fsspec's file system.", json_schema_extra={"secret": True}
    )
    max_upload_bytes: int = Field(default=200 * 1024 * 1024, ge=1)
    expires_after_s: int = Field(default=2_592_000, ge=3600, description="For files that name no expiry; 30 days.")
    orphans_after_s: int = Field(
        default=86_400, ge=3600, description="Age at which objects that nothing leads to are removed."
    )
