"""``python -m tests.support.deploy_app [NAME=VALUE...]``: (re)deploy the workers on the Ray in ``RAY_ADDRESS``.

Settings come from the environment, changed by the arguments, as ``serve deploy`` would be given them.
"""

from __future__ import annotations

import os
import sys

import ray
from ray import serve

from penstock.workers.app import APPLICATION, app


def main() -> None:
    """Return when the application runs as it should."""
    os.environ |= dict(word.split("=", 1) for word in sys.argv[1:])
    ray.init(log_to_driver=False)
    serve.start(proxy_location="Disabled")
    serve.run(app(), name=APPLICATION, route_prefix=None)
    ray.shutdown()


if __name__ == "__main__":
    main()
