"""What every process of a deployment must agree on: the queue, Redis and the model.

One file (``penstock.toml``, or the path in ``PENSTOCK_CONFIG``) has a table per section; an environment variable
``PENSTOCK_<SECTION>_<NAME>`` overrides the value ``name`` of table ``[section]``. Same names in both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

CONFIG_VARIABLE = "PENSTOCK_CONFIG"
DEFAULT_CONFIG = "penstock.toml"


class _TomlSection(TomlConfigSettingsSource):
    """The table of one section in the settings file."""

    def __init__(self, settings_cls: type[Section]) -> None:
        path = Path(os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG))
        super().__init__(settings_cls, path)
        self._section = settings_cls.section

    def __call__(self) -> dict[str, Any]:
        table = self.toml_data.get(self._section, {})
        return dict(table)


class Section(BaseSettings):
    """Base of all settings sections: explicit values first, then the environment, then the file."""

    section: ClassVar[str]
    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order of precedence; no ``.env`` file and no secrets folder, so that there is one place to look."""
        assert issubclass(settings_cls, Section)
        return init_settings, env_settings, _TomlSection(settings_cls)


class RedisSettings(Section):
    """Where emitted tokens and request states live."""

    section = "redis"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_REDIS_", extra="forbid", frozen=True)

    url: str = "redis://127.0.0.1:6379/0"
    namespace: str = "ps:"
    retention_s: int = Field(default=3600, ge=1, description="How long a finished answer can still be read.")
    lifetime_s: int = Field(default=172_800, ge=60, description="How long an unfinished request's state is kept.")


class QueueSettings(Section):
    """Which broker carries accepted work."""

    section = "queue"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_QUEUE_", extra="forbid", frozen=True)

    backend: Literal["redis", "kafka"] = "redis"
    bootstrap: str = Field(default="127.0.0.1:9092", description="Kafka bootstrap servers, comma-separated.")
    partitions: int = Field(default=4, ge=1, description="Partitions of a topic made by Penstock.")
    replication: int = Field(default=1, ge=1, description="Replication factor of a topic made by Penstock.")
    min_insync: int | None = Field(
        default=None, ge=1, description="Brokers that must have a record before it counts; default: all but one."
    )
    max_record_bytes: int = Field(default=900_000, ge=1024, description="Larger records are stored beside.")

    @property
    def min_insync_replicas(self) -> int:
        """``min.insync.replicas`` of topics: by default one broker may be away, and where there is but one, none."""
        return self.min_insync or max(1, self.replication - 1)

    @model_validator(mode="after")
    def _can_be_written(self) -> QueueSettings:
        if self.min_insync_replicas > self.replication:
            raise ValueError(f"min_insync is {self.min_insync}, but a topic has {self.replication} replicas only")
        return self


class ModelSettings(Section):
    """The model that ingress and engines serve."""

    section = "model"
    model_config = SettingsConfigDict(
        env_prefix="PENSTOCK_MODEL_", extra="forbid", frozen=True, protected_namespaces=()
    )

    path: str = Field(min_length=1, description="Folder with the model, or its name on the hub (ORG/NAME).")
    name: str = Field(default="", description="Name clients ask for; empty means the last part of the path.")
    pool: str = "default"
    release: str = "r0"
    max_model_len: int | None = Field(default=None, ge=1)
    dtype: str = "auto"
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Further vLLM engine arguments by name.")

    @property
    def served_name(self) -> str:
        """The name clients ask for."""
        return self.name or Path(self.path).name
