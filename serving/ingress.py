"""One ingress process: vLLM's own OpenAI application with the queue as its engine, behind Penstock's edge.

Stateless: everything accepted is on the broker, everything emitted in the token log. Several run side by side.
"""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import redis.asyncio
import structlog
import uvicorn
import uvloop

from penstock.queue.factory import open_queue
from penstock.queue.logs import VLLM_ENVIRONMENT, Unless, configure_logging
from penstock.queue.mailbox import Mailbox, TokenReader
from penstock.queue.protocol import RequestQueue
from penstock.queue.readers import Readers
from penstock.queue.records import new_request_id
from penstock.queue.redis_client import connect_async
from penstock.queue.registry import Registry
from penstock.queue.settings import ModelSettings, QueueSettings, RedisSettings
from penstock.queue.token_log import RequestLog
from penstock.serving.admission import Backlog
from penstock.serving.batches.backend import InnerBackend
from penstock.serving.batches.service import BatchService
from penstock.serving.batches.settings import BatchSettings
from penstock.serving.durable.inner import Inner
from penstock.serving.durable.store import RequestStore
from penstock.serving.edge.asgi import App
from penstock.serving.edge.direct import Direct
from penstock.serving.edge.layers import wrap
from penstock.serving.edge.streams import Kept
from penstock.serving.files.settings import FilesSettings
from penstock.serving.handlers import Handlers
from penstock.serving.readiness import Readiness
from penstock.serving.server import Server, serve_beside
from penstock.serving.settings import IngressSettings
from penstock.serving.tenants import KeyStore, open_authenticator

if TYPE_CHECKING:
    from penstock.serving.engine_client import QueueClient

DRAIN_S = 30
"""How long open streams may go on after SIGTERM; then their clients reconnect elsewhere."""
IDLE_CONNECTION_S = 75
"""Keep-alive of idle client connections: longer than the 60 s of common load balancers, so that these close first."""

log = structlog.get_logger()

FORCED_ENVIRONMENT = {"VLLM_ENABLE_RESPONSES_API_STORE": "0"}
"""vLLM keeps responses in one process' memory, for whoever names their id: neither durable nor a tenant's own."""
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | VLLM_ENVIRONMENT
"""Defaults for vLLM inside an ingress, which holds no model: no telemetry, a token KV cache, our log."""


async def serve(
    settings: IngressSettings, queue_settings: QueueSettings, redis_settings: RedisSettings, model: ModelSettings
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UnsafeBinding: the address is reachable from outside and there are no API keys.
        StoreUnavailable: Redis is away.
        Exception: what ended the work on batches.
    """
    client = connect_async(redis_settings)
    authenticator = await open_authenticator(KeyStore(client, redis_settings), settings.host)
    queue = open_queue(queue_settings, redis_settings, model.pool)
    backlog = Backlog(settings.max_backlog_requests, redis_settings, model.pool)
    readers = Readers(client, redis_settings, f"ingress:{new_request_id()}")
    vllm, engine = await _vllm_app(settings, model, queue, client, redis_settings, backlog, readers)
    handlers = Handlers(vllm)
    app = _shortened(vllm, handlers)
    batches = BatchService(client, redis_settings, FilesSettings(), BatchSettings())
    edge = wrap(
        app,
        settings=settings,
        authenticator=authenticator,
        missing=Readiness(queue, client, Registry(client, redis_settings), model.pool),
        kept=Kept(RequestStore(client, redis_settings), readers),
        beside=batches.wrap,
    )
    watching = asyncio.create_task(backlog.watch())
    backend = InnerBackend(handlers, Inner(app), readers, engine)
    batch_work = asyncio.create_task(batches.run(backend, model.served_name))
    try:
        await serve_beside(_server(edge, settings, engine), batch_work)
    finally:
        watching.cancel()
        batch_work.cancel()
        await asyncio.wait([batch_work])
        await queue.close()
        await client.aclose()


async def _vllm_app(
    settings: IngressSettings,
    model: ModelSettings,
    queue: RequestQueue,
    client: redis.asyncio.Redis,
    redis_settings: RedisSettings,
    backlog: Backlog,
    readers: Readers,
) -> tuple[Any, QueueClient]:
    """vLLM's FastAPI application, and the queue it has for an engine.

    Its modules are imported here: they take many seconds, `--help` must not.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.envs import enable_envs_cache
    from vllm.exceptions import GracefulHTTPError
    from vllm.usage.usage_lib import UsageContext

    from penstock.serving import output_queue
    from penstock.serving.durable import determinism
    from penstock.serving.engine_client import QueueClient
    from penstock.serving.metrics import drop_engine_gauges
    from penstock.serving.queue_llm import QueueLLM

    for handler in logging.getLogger().handlers:
        handler.addFilter(Unless(GracefulHTTPError))  # the line of its request says as much
    output_queue.install()
    determinism.install()
    mailbox = Mailbox(client, redis_settings, readers.channel)
    reader = TokenReader(mailbox, RequestLog(client, redis_settings), readers)
    core = QueueClient(queue, reader, readers, model)
    args = vllm_arguments(settings, model)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    engine = QueueLLM(config, core, backlog)
    drop_engine_gauges()
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, config.model_config)
    await init_app_state(engine, app.state, args, tasks)
    enable_envs_cache()  # as in vLLM's engines: it reads its variables several times a token
    return app, core


def _shortened(vllm: Any, handlers: Handlers) -> App:
    """vLLM's application without what costs most of it, unless somebody put something of theirs in there."""
    from vllm import envs

    args = vllm.state.args
    special = args.middleware or args.api_key or envs.VLLM_API_KEY or args.enable_server_load_tracking
    return cast(App, vllm) if special else Direct(vllm, handlers)


def vllm_arguments(settings: IngressSettings, model: ModelSettings) -> Namespace:
    """Arguments of vLLM's API server for this model, as its own parser makes them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", model.path, "--served-model-name", model.served_name, "--dtype", model.dtype]
    words += ["--enable-prompt-tokens-details"]  # cached tokens in usage
    if model.max_model_len is not None:
        words += ["--max-model-len", str(model.max_model_len)]
    if settings.tool_call_parser:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if settings.reasoning_parser:
        words += ["--reasoning-parser", settings.reasoning_parser]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([*words, *settings.vllm_args])
    validate_parsed_serve_args(args)
    return args


def _server(app: Any, settings: IngressSettings, engine: QueueClient) -> Server:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        log_config=None,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    log.info("ingress_listening", host=settings.host, port=settings.port)
    return Server(config, leaving=engine.drain)


def main() -> None:
    """``penstock ingress``."""
    configure_logging("ingress")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= FORCED_ENVIRONMENT
    with suppress(KeyboardInterrupt):
        uvloop.run(serve(IngressSettings(), QueueSettings(), RedisSettings(), ModelSettings()))


if __name__ == "__main__":
    main()
