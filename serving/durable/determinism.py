"""Makes vLLM's handlers give the same answer the same ids and times, however often it is rendered.

vLLM draws ids (of tool calls, output items, responses) by ``vllm.utils.random_uuid`` and stamps ``created`` by
``time.time``, wherever an object is made. A client that resumes must find the ids it was given before, so within a
request both are functions of the stream id and the time of acceptance. ``random_uuid`` is bound by name in some fifty
modules; what all of them share is the ``uuid`` module in its own module's namespace, and that is what is replaced
here; likewise ``time`` in the few modules that stamp answers. Outside of a request nothing changes.

One use must stay random: the suffix that tells two renderings of one request apart inside one process.
"""

from __future__ import annotations

import importlib
import time
import uuid
from types import ModuleType
from typing import Any

from penstock.serving.context import current_or_none

STAMPING = (
    "vllm.entrypoints.generate.base.serving",
    "vllm.entrypoints.openai.chat_completion.protocol",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.protocol",
    "vllm.entrypoints.openai.completion.serving",
    "vllm.entrypoints.openai.responses.protocol",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.anthropic.protocol",
    "vllm.entrypoints.anthropic.serving",
)
"""Modules whose ``time.time()`` ends up in answers (and in nothing else)."""


class _Uuids:
    """``uuid`` for a module that draws ids."""

    def uuid4(self) -> uuid.UUID:
        context = current_or_none()
        return uuid.uuid4() if context is None else context.draws.uuid4()

    def __getattr__(self, name: str) -> Any:
        return getattr(uuid, name)


class _Clock:
    """``time`` for a module that stamps answers."""

    def time(self) -> float:
        context = current_or_none()
        return time.time() if context is None else context.draws.seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def install() -> None:
    """Do it, once for the process.

    Raises:
        AttributeError: this vLLM draws or stamps elsewhere; its release needs a look.
    """
    import vllm.utils
    import vllm.v1.engine.input_processor as internal_ids

    truly_random = type(vllm.utils.random_uuid)(vllm.utils.random_uuid.__code__, dict(vars(vllm.utils)), "random_uuid")
    _replace(internal_ids, "random_uuid", truly_random)
    _replace(vllm.utils, "uuid", _Uuids())
    _replace(importlib.import_module("vllm.entrypoints.anthropic.serving"), "uuid", _Uuids())
    for name in STAMPING:
        _replace(importlib.import_module(name), "time", _Clock())


def _replace(module: ModuleType, name: str, value: object) -> None:
    getattr(module, name)
    setattr(module, name, value)
