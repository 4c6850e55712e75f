"""Who is calling: ``Authorization: Bearer`` or Anthropic's ``x-api-key``."""

from __future__ import annotations

from penstock.serving.edge.asgi import App, Receive, Scope, Send, header
from penstock.serving.edge.exchange import exchange_of
from penstock.serving.tenants import Authenticator


class Auth:
    """Lets known callers in. Public routes and CORS preflights (which carry no credentials) pass."""

    def __init__(self, app: App, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        if not exchange.route.public and scope["method"] != "OPTIONS":
            exchange.caller = await self._authenticator.authenticate(api_key(scope))
        await self._app(scope, receive, send)


def api_key(scope: Scope) -> str | None:
    """The key the client sent, or None."""
    scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return header(scope, b"x-api-key") or None
