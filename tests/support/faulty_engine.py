"""``python -m tests.support.faulty_engine --role ROLE``: a vLLM engine whose transfers fail or whose leases are short.

``FAULTY_READS``: every so manieth read of another engine's KV cache fails as it does when UCX reports an error.
``FAULTY_LEASE_S``: how long KV that nobody reads is kept, instead of half a minute; what is derived from it shrinks
alike.
"""

from __future__ import annotations

import argparse
import itertools
import os
from typing import Any

import structlog

from penstock.queue.settings import ModelSettings
from penstock.workers import engine, loop, stream
from penstock.workers.engine_process import engine_environment, main

log = structlog.get_logger()


def _shorten(lease_s: int) -> None:
    share = lease_s / engine.KV_LEASE_S
    engine.KV_LEASE_S = lease_s
    stream.KV_TRUST_S *= share
    loop.PAUSED_S *= share


def _break_reads(every: int) -> None:
    from vllm.distributed import nixl_utils

    original = nixl_utils.NixlWrapper.make_prepped_xfer
    reads = itertools.count(1)

    def failing(self: Any, operation: str, *args: Any, **options: Any) -> Any:
        if operation == "READ" and next(reads) % every == 0:
            log.warning("kv_load_failed")
            raise RuntimeError("injected: the transfer failed")
        return original(self, operation, *args, **options)

    nixl_utils.NixlWrapper.make_prepped_xfer = failing


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", required=True)
    role = parser.parse_args().role
    os.environ |= engine_environment(ModelSettings())
    if lease := int(os.environ.get("FAULTY_LEASE_S", "0")):
        _shorten(lease)
    if every := int(os.environ.get("FAULTY_READS", "0")):
        _break_reads(every)
    main(role, "127.0.0.1")
