"""One ingress process: vLLM's own OpenAI application with the queue as its engine, behind Penstock's edge.

Stateless: everything accepted is on the broker, everything emitted in the token log. Several run side by side.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from contextlib import suppress
from typing import Any

import redis.asyncio
import structlog
import uvicorn

from penstock.queue.factory import open_queue
from penstock.queue.logs import configure_logging
from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.protocol import RequestQueue
from penstock.queue.records import new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.registry import Registry
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog
from penstock.serving.admission import Backlog
from penstock.serving.edge import wrap
from penstock.serving.readiness import Readiness
from penstock.serving.settings import IngressSettings
from penstock.serving.tenants import KeyStore, open_authenticator

DRAIN_S = 30
"""How long open streams may go on after SIGTERM; then their clients reconnect elsewhere."""
IDLE_CONNECTION_S = 75
"""Keep-alive of idle client connections: longer than the 60 s of common load balancers, so that these close first."""

log = structlog.get_logger()

FORCED_ENVIRONMENT = {"VLLM_ENABLE_RESPONSES_API_STORE": "0"}
"""vLLM keeps responses in one process' memory, for whoever names their id: neither durable nor a tenant's own."""
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Defaults for vLLM inside an ingress, which holds no model: no telemetry, only warnings, a token KV cache."""


async def serve(
    settings: IngressSettings, queue_settings: QueueSettings, redis_settings: RedisSettings, model: ModelSettings
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UnsafeBinding: the address is reachable from outside and there are no API keys.
        StoreUnavailable: Redis is away.
    """
    client = connect_async(redis_settings)
    authenticator = await open_authenticator(KeyStore(client, redis_settings), settings.host)
    queue = open_queue(queue_settings, redis_settings, model.pool)
    backlog = Backlog(settings.max_backlog_requests, redis_settings, model.pool)
    app = await _vllm_app(settings, model, queue, client, redis_settings, backlog)
    missing = Readiness(queue, client, Registry(client, redis_settings), model.pool)
    edge = wrap(app, settings=settings, authenticator=authenticator, missing=missing)
    watching = asyncio.create_task(backlog.watch())
    try:
        await _listen(edge, settings)
    finally:
        watching.cancel()
        await queue.close()
        await client.aclose()


async def _vllm_app(
    settings: IngressSettings,
    model: ModelSettings,
    queue: RequestQueue,
    client: redis.asyncio.Redis,
    redis_settings: RedisSettings,
    backlog: Backlog,
) -> Any:
    """vLLM's FastAPI application. Its modules are imported here: they take many seconds, `--help` must not."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.usage.usage_lib import UsageContext

    from penstock.serving.engine_client import QueueClient, QueueLLM
    from penstock.serving.metrics import drop_engine_gauges

    request_log = RequestLog(client, redis_settings)
    reader = TokenReader(Mailbox(client, redis_settings, f"ingress:{new_request_id()}"), request_log)
    args = vllm_arguments(settings, model)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    engine = QueueLLM(config, QueueClient(queue, request_log, reader, model), backlog)
    drop_engine_gauges()
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, config.model_config)
    await init_app_state(engine, app.state, args, tasks)
    return app


def vllm_arguments(settings: IngressSettings, model: ModelSettings) -> Namespace:
    """Arguments of vLLM's API server for this model, as its own parser makes them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", model.path, "--served-model-name", model.served_name, "--dtype", model.dtype]
    if model.max_model_len is not None:
        words += ["--max-model-len", str(model.max_model_len)]
    if settings.tool_call_parser:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if settings.reasoning_parser:
        words += ["--reasoning-parser", settings.reasoning_parser]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([*words, *settings.vllm_args])
    validate_parsed_serve_args(args)
    return args


async def _listen(app: Any, settings: IngressSettings) -> None:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = uvicorn.Server(config)
    log.info("ingress_listening", host=settings.host, port=settings.port)
    await server.serve()


def main() -> None:
    """``penstock ingress``."""
    configure_logging("ingress")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= FORCED_ENVIRONMENT
    import uvloop

    with suppress(KeyboardInterrupt):
        uvloop.run(serve(IngressSettings(), QueueSettings(), RedisSettings(), ModelSettings()))


if __name__ == "__main__":
    main()
