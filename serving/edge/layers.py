"""How the layers are put together."""

from __future__ import annotations

from collections.abc import Callable

from penstock.serving.durable.inner import Inner
from penstock.serving.durable.responses import Responses
from penstock.serving.edge.access import Access
from penstock.serving.edge.asgi import App
from penstock.serving.edge.auth import Auth
from penstock.serving.edge.durable import Durable
from penstock.serving.edge.errors import Errors
from penstock.serving.edge.event_ids import EventIds
from penstock.serving.edge.intake import Intake
from penstock.serving.edge.keepalive import KeepAlive
from penstock.serving.edge.routes import Missing, Routes
from penstock.serving.edge.streams import Kept, Streams
from penstock.serving.settings import IngressSettings
from penstock.serving.tenants import Authenticator


def wrap(
    app: App,
    *,
    settings: IngressSettings,
    authenticator: Authenticator,
    missing: Missing,
    beside: Callable[[App], App] = lambda known: known,
    kept: Kept | None = None,
) -> App:
    """vLLM's ``app`` as the world sees it. ``missing`` tells what ``/ready`` has to report, see :class:`Routes`.
    ``beside`` puts further routes in front, whose bodies are not read for them. ``kept`` is where answers are found
    that are asked for again; without it, none are.
    """
    known = _durable(app, settings, kept) if kept else Intake(KeepAlive(app, settings.keepalive_s), settings)
    offered = Routes(Auth(beside(known), authenticator), missing)
    return Access(Errors(offered), lifespan=app)


def _durable(app: App, settings: IngressSettings, kept: Kept) -> App:
    responses = Responses(Inner(app), kept.store, kept.readers)
    durable = Durable(KeepAlive(EventIds(app), settings.keepalive_s), kept.store, responses, settings)
    return Streams(Intake(durable, settings), durable, kept, responses)
