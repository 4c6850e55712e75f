"""One HTTP exchange, as the layers of the edge share it."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.queue.records import PriorityClass
from penstock.serving.context import Outcome
from penstock.serving.edge.asgi import Scope
from penstock.serving.edge.routes import Route, route_of
from penstock.serving.tenants import KeyInfo

_KEY = "penstock.exchange"


@dataclass(slots=True)
class Exchange:
    """Filled from the outside in: each layer adds what it found out, the outermost logs the whole."""

    request_id: str
    route: Route
    caller: KeyInfo | None = None
    priority_class: PriorityClass | None = None
    model: str | None = None
    status: int = 0
    streaming: bool = False
    disconnected: bool = False
    outcome: Outcome = field(default_factory=Outcome)

    def speak_for(self, path: str) -> None:
        """Answer in the dialect of another path: its answer is given on this one."""
        self.route = self.route._replace(dialect=route_of(path).dialect)


def attach(scope: Scope, exchange: Exchange) -> None:
    """Give the layers below this exchange."""
    scope[_KEY] = exchange


def exchange_of(scope: Scope) -> Exchange:
    """The exchange of this scope."""
    found = scope[_KEY]
    assert isinstance(found, Exchange)
    return found
