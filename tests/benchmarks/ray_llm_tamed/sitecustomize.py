"""Put on ``PYTHONPATH``, makes NIXL's progress thread pause between polls, in whichever process makes an agent.

What Penstock's engines do too (``nixl_progress_delay_us``). NIXL's Python API hard-codes no pause, so that each engine
burns a core from its first transfer on; vLLM imports that API by name, and only engine processes do.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

API = "nixl._api"
DELAY_US = int(os.environ["NIXL_PROGRESS_DELAY_US"])

_import_module = importlib.import_module


def _import_and_tame(name: str, package: str | None = None) -> ModuleType:
    module = _import_module(name, package)
    if name == API:
        _tame(sys.modules[module.nixl_agent.__module__].nixlBind)
    return module


def _tame(bindings: Any) -> None:
    original = bindings.nixlAgentConfig

    def set_attribute(config: Any, name: str, value: Any) -> None:
        original.__setattr__(config, name, DELAY_US if name == "pthrDelay" else value)

    if original.__name__ != "TamedAgentConfig":  # once, however often it is imported
        bindings.nixlAgentConfig = type("TamedAgentConfig", (original,), {"__setattr__": set_attribute})
        print(f"NIXL's progress thread pauses {DELAY_US} us between polls", file=sys.stderr, flush=True)


importlib.import_module = _import_and_tame
