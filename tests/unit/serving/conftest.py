"""The edge in front of small applications, with keys kept in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.serving.edge.asgi import App
from penstock.serving.edge.layers import wrap
from penstock.serving.edge.routes import Missing
from penstock.serving.settings import IngressSettings
from penstock.serving.tenants import Authenticator
from tests.unit.serving.apps import KEYS, MemoryKeys


async def nothing_missing() -> dict[str, str]:
    return {}


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys(dict(KEYS))


@pytest.fixture
def edge(keys: MemoryKeys) -> Callable[..., App]:
    """``edge(app, keepalive_s=...)``: the app behind all layers; settings by name."""

    def build(app: App, missing: Missing = nothing_missing, **settings: object) -> App:
        ingress = IngressSettings.model_validate(settings)
        return wrap(app, settings=ingress, authenticator=Authenticator(keys, open_mode=False), missing=missing)

    return build
