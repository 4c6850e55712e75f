"""The rows of the report."""

from __future__ import annotations

from tests.chaos.row import Row
from tests.chaos.rows import batches, clients, dispatchers, engines, network, poison, stores

_ALL = (
    *engines.ROWS, *clients.ROWS, *dispatchers.ROWS, *poison.ROWS, *stores.ROWS, *network.ROWS, *clients.EDGE_ROWS,
    *batches.ROWS,
)  # fmt: skip
ROWS: dict[str, Row] = {row.name: row for row in _ALL}
"""By name. Rows of one shape stand together: they share a deployment."""
