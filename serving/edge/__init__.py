"""Penstock's own layers in front of vLLM's HTTP application: plain ASGI, one concern each.

No layer buffers a response or hides a disconnect: what vLLM streams leaves at once, and a client that goes
away still cancels its generation.
"""

from __future__ import annotations

from penstock.serving.edge.access import Access
from penstock.serving.edge.asgi import App
from penstock.serving.edge.auth import Auth
from penstock.serving.edge.errors import Errors
from penstock.serving.edge.intake import Intake
from penstock.serving.edge.keepalive import KeepAlive
from penstock.serving.edge.routes import Missing, Routes
from penstock.serving.settings import IngressSettings
from penstock.serving.tenants import Authenticator


def wrap(app: App, *, settings: IngressSettings, authenticator: Authenticator, missing: Missing) -> App:
    """vLLM's ``app`` as the world sees it. ``missing`` tells what ``/ready`` has to report, see
    :class:`Routes`.
    """
    known = Intake(KeepAlive(app, settings.keepalive_s), settings)
    offered = Routes(Auth(known, authenticator), missing)
    return Access(Errors(offered), lifespan=app)
