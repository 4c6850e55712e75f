"""``python -m tests.support.serve_app deploy [NAME=VALUE...] | settled``, on the Ray in ``RAY_ADDRESS``.

``deploy`` (re)deploys the workers; settings come from the environment, changed by the arguments, as ``serve deploy``
would be given them. ``settled`` changes nothing. Both say ``DONE`` when Serve says that the application runs as it
should.
"""

from __future__ import annotations

import os
import sys

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from penstock.workers.app import APPLICATION, app
from tests.support.ray_node import DONE
from tests.support.waiting import eventually

SETTLED_S = 240.0
"""For a new controller of Serve to find its replicas, on a machine that is doing other things."""


def deploy(*changes: str) -> None:
    """Return when every replica is one of this deployment."""
    os.environ |= dict(word.split("=", 1) for word in changes)
    serve.start(proxy_location="Disabled")
    serve.run(app(), name=APPLICATION, route_prefix=None)


def settled() -> None:
    """Return when Serve has found, or started, all replicas that it wants."""
    eventually(lambda: _status() is ApplicationStatus.RUNNING, SETTLED_S, "the application runs")


def _status() -> ApplicationStatus | None:
    found = serve.status().applications.get(APPLICATION)
    return found.status if found else None


def main(command: str, *words: str) -> None:
    """Run one command as a driver of its own."""
    ray.init(log_to_driver=False)
    {"deploy": deploy, "settled": settled}[command](*words)
    ray.shutdown()
    print(DONE, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
