"""All settings sections, and the environment variable of each value."""

from __future__ import annotations

from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings, Section
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.files.settings import FilesSettings
from penstock.serving.settings import IngressSettings
from penstock.workers.settings import WorkerSettings

SECTIONS: tuple[type[Section], ...] = (
    RedisSettings,
    QueueSettings,
    ModelSettings,
    IngressSettings,
    FilesSettings,
    BatchSettings,
    WorkerSettings,
)
RESERVED = frozenset(
    {
        "PENSTOCK_CONFIG",
        "PENSTOCK_RAY_TEMP",
        "PENSTOCK_BASE_URL",
        "PENSTOCK_API_KEY",
        "PENSTOCK_INPUT_PRICE",
        "PENSTOCK_OUTPUT_PRICE",
    }
)
"""Variables of Penstock that are no setting of a section."""


def variable_of(section: type[Section], name: str) -> str:
    """``PENSTOCK_<SECTION>_<NAME>``."""
    return f"{section.model_config['env_prefix']}{name}".upper()
