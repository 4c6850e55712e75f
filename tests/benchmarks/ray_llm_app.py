"""Ray Serve LLM's prefill/decode application, run by the Python of a virtual environment of its own.

Knows nothing of Penstock, which is not installed there. The environment carries what applies to engine processes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_pd_openai_app

NUM_CPUS = 8
"""What Ray counts with: placement groups, ingress and controllers ask for a CPU each, however few there are."""
OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""As for Penstock's Ray."""
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def engine(role: str, options: argparse.Namespace) -> LLMConfig:
    """One replica of one role, with the engine arguments every contender has."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": KV_ROLES[role], "kv_buffer_device": "cpu"}
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "kv_transfer_config": transfer,
        **json.loads(options.engine_args),
    }
    return LLMConfig(
        model_loading_config={"model_id": options.name, "model_source": options.model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={"num_replicas": 1},
        engine_kwargs=arguments,
    )


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--name", "--dtype", "--engine-args", "--temp-dir"):
        parser.add_argument(flag, required=True)
    for flag in ("--port", "--max-model-len"):
        parser.add_argument(flag, type=int, required=True)
    options = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=options.temp_dir,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # now, for Ray installs a handler of its own
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": options.port})
        serve.run(build_pd_openai_app({f"{role}_config": engine(role, options) for role in KV_ROLES}))
        signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
