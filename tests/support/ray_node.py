"""``python -m tests.support.ray_node head|worker PORT TEMP``: one node of a Ray, with as little around it as can be.

``ray start`` also starts a log monitor, an autoscaler and a client server; each is an interpreter, and a node has a
fixed 15 s to start.
"""

from __future__ import annotations

import signal
import sys

OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Ray's minimum, nearly."""
HOST = "127.0.0.1"
STARTED = "node is up"
DONE = "done"
"""What a node says, and a client of Serve (``serve_app``)."""


def main(role: str, port: int, temp_dir: str) -> None:
    """Run until a signal ends the process."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    head = role == "head"
    place = {"gcs_server_port": port, "temp_dir": temp_dir, "no_monitor": True} if head else {}
    params = RayParams(
        node_ip_address=HOST,
        gcs_address=None if head else f"{HOST}:{port}",
        num_cpus=0 if head else 16,
        object_store_memory=OBJECT_STORE_BYTES,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,
        include_dashboard=False,
        **place,
    )
    Node(params, head=head, shutdown_at_exit=True, spawn_reaper=False)
    print(STARTED, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
