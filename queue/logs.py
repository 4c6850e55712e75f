"""Structured logs: one JSON line per event on standard error, with the request id where there is one.

What libraries log by Python's own means (vLLM, uvicorn, Ray's client) comes out in the same form, tracebacks included.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import structlog

LIBRARIES = {"": "WARNING", "vllm": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
"""From which level on each says something; the first is all others."""
VLLM_ENVIRONMENT = {} if "VLLM_LOGGING_CONFIG_PATH" in os.environ else {"VLLM_CONFIGURE_LOGGING": "0"}
"""So that vLLM leaves its logger to us, unless an operator has configured it."""
_SHARED: Sequence[Any] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Set up this process' log; ``process`` (ingress, dispatcher, prefill, ...) is on every line."""
    render = (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
    structlog.configure(
        processors=[*_SHARED, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    _take_in_libraries(process, render)


def _take_in_libraries(process: str, render: Sequence[Any]) -> None:
    def ours(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        record = event["_record"]
        return {"process": process, "logger": record.name, **event}  # threads have contexts of their own

    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_SHARED],
        processors=[ours, structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.getLogger().handlers[:] = [handler]
    for name, least in LIBRARIES.items():
        logging.getLogger(name).setLevel(least)
    logging.captureWarnings(True)


class Unless(logging.Filter):
    """Passes everything but records of an expected exception, which is told elsewhere in one line."""

    def __init__(self, expected: type[BaseException]) -> None:
        super().__init__()
        self._expected = expected

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        return not (record.exc_info and isinstance(record.exc_info[1], self._expected))


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The log of this process."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
